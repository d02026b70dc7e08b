"""The page of `supremum evaluate`: whole with every part and with few, harmless with hostile text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_pages import HOSTILE, Elements

from supremum.report.evaluation import looks, slices, strengths, tasks
from supremum.report.html import evaluation_page


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "level": 0.95, "p": None}


def side(top: str, shares: list[float]) -> dict[str, Any]:
    return {"top": top, "log_p": -0.5, "shares": shares, "attention": {"block 2 of 2": [[1.0, 0.0], [0.7, 0.3]]}}


def document(word: str = "river") -> dict[str, Any]:
    quality = {"perplexity": 30.25, "perplexity_se": 0.5, "perplexity_reference": 28.0, "perplexity_reference_se": 0.5,
               "kl_mean": 0.0654, "kl_se": 0.0019, "same_top": 0.871, "tokens": 2040, "windows": 8}
    rows = [{"name": word, "tokens": 9, "share": 0.25, "nll": 2.0, "interval": interval(0.5), "excess_nll": 0.1, "kl": 0.5,
             "same_top": 0.8}]
    details = {"bits_per_byte": 0.981, "bits_per_byte_reference": 0.975, "ece": 0.02, "ece_reference": 0.01,
               "slices": {"kind": rows, "place": [], "frequency": rows},
               "most_changed": [{"before": word, "token": word, "reference": word, "model": word, "kl": 4.5}]}
    explained = [{"tokens": [word, " moves"], "target": word, "true": word, "kl": 4.5, "likeness": 0.68,
                  "reference": side(word, [2.0, -1.0]), "model": side("stone", [0.5, 0.0])}]
    text = {"text": "held-out.txt", "quality": quality, "details": details, "perturbed": {}, "explained": explained}
    task = {"name": word, "cases": 40, "chance": 0.5, "acc": interval(0.65), "acc_reference": interval(0.7),
            "flips": {"lost": 3, "gained": 1, "p": 0.62}, "margin_change": None}
    gap = {"name": "x", "groups": [word, "b"], "paired": True, "acc": interval(-0.05), "acc_reference": interval(-0.02)}
    compared = {"value": interval(0.881), "reference": interval(0.887), "change": interval(-0.006) | {"p": 0.31}}
    scored = {"figures": {"accuracy": compared, word: compared}, "flips": {"lost": 21, "gained": 10, "both": 31, "p": 0.07},
              "labels": [{"name": word, "cases": 40, "found": 30, "f1": compared, "found_reference": 31, "lost": 2,
                          "gained": 1}],
              "same": 0.97, "more": {"signature": word}, "more_reference": {}}
    tuned = {"task": "classify", "metric": "accuracy", "rows": 40, "total": 50, "digest": "0", "leaked": 2, "as_tuned": True,
             "scored": scored, "perturbed": {"typos": scored},
             "explained": [{"where": f"{word}, line 3", "sure": 0.412, "change": -0.5, "unit": "probability",
                            "explained": explained[0]}]}
    many = gap | {"groups": [word, "c"], "paired": False, "acc": interval(0.2) | {"p": 0.031},
                  "by_group": {name: interval(0.5) for name in (word, "b", "c")}}
    return {"model": word, "reference": "demo", "task": tuned, "texts": [text | {"perturbed": {"typos": text}}],
            "tasks": [task], "gaps": [gap, many], "harness": [{"task": word, "metric": "acc", "value": 0.5, "stderr": None}]}


def test_the_page_shows_what_was_measured() -> None:
    text = " ".join(" ".join(Elements(evaluation_page(document())).visible).split())
    for expected in ("0.0654 ± 0.0019", "87.1 %", "30.25 ± 0.50", "0.9810 (0.9750)", "2.0 % (1.0 %)", "-3 +1", "-5.0", "4.50",
                     "c (worst and best of 3 groups)", "0.031",
                     "likeness of the two colourings 0.68", "its probability 0.412, change -0.5", "Why an answer changed",
                     "Explained: “river”. Right: “river”.", "log p of what is explained: -0.50", "typos",
                     "55.0 to 75.0", "40 of 50 test rows",
                     "0.881 0.781 to 0.981 0.887 -0.006 -0.106 to +0.094 0.31", "21 right answers are wrong now", "75.0 %"):
        assert expected in text, expected


@pytest.mark.parametrize("less", ["task", "texts", "tasks", "gaps", "harness"])
def test_a_part_that_was_not_measured_is_left_out(less: str) -> None:
    whole = document()
    whole.pop(less)
    assert evaluation_page(whole)
    alone = document() | {"reference": None, "gaps": []}
    for one in (alone["task"]["scored"], *alone["task"]["perturbed"].values()):
        one |= {"flips": None, "same": None, "labels": [], "figures": {"accuracy": {
            "value": interval(0.881), "reference": None, "change": None}}}
    explained = alone["texts"][0]["explained"][0] | {"reference": None, "kl": None, "likeness": None}
    alone["task"]["explained"] = [alone["task"]["explained"][0] | {"change": None, "unit": "nats a token", "sure": -0.25,
                                                                   "explained": explained}]
    alone["texts"][0] |= {"explained": [explained], "details": None}
    alone["texts"][0]["quality"] |= {"kl_mean": None, "kl_se": None, "same_top": None}
    page = evaluation_page(alone)
    text = " ".join(" ".join(Elements(page).visible).split())
    assert "Perplexity 30.25" in text and "What the answers rest on" in text and "its log p, nats a token, -0.25" in text
    assert "Where it looks" in text and "likeness" not in text and "Original" not in text
    figure = looks(explained, "block 2 of 2")
    assert len(figure["data"]) == 1 and figure["data"][0]["showscale"] and "xaxis2" not in figure["layout"]


def test_hostile_words_stay_words() -> None:
    page = Elements(evaluation_page(document(HOSTILE)))
    assert len(page.scripts) == 3 and not any(tag == "img" for tag, _ in page.tags)
    figures = json.loads(page.scripts[0])
    assert "<img" not in json.dumps([figures["tasks"], figures["attention0-0"], figures["slices0"]])


def test_colours_share_one_scale_and_the_first_token_does_not_set_that_of_attention() -> None:
    (one,) = document()["texts"][0]["explained"]
    original, model = strengths(one)
    assert [(t["strength"], t["up"]) for t in original["tokens"]] == [(100, True), (50, False)]
    assert model["tokens"][0]["strength"] == 25
    figure = looks(one, "block 2 of 2")
    assert figure["data"][0]["zmax"] == 0.3 and figure["data"][0]["z"][0] == [1.0, None]


def test_intervals_are_drawn_where_they_lie() -> None:
    original, model, guess = tasks(document()["tasks"])["data"]
    assert (model["x"], guess["x"]) == ([65.0], [50.0]) and original["x"] == [70.0]
    assert model["error_x"]["array"][0] == pytest.approx(10) == model["error_x"]["arrayminus"][0]
    assert slices(document()["texts"][0]["details"]["slices"]["kind"])["data"][0]["x"] == [0.5]
