"""Figures and words: rounded as a person expects, at every magnitude."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import build

from supremum.report import words
from supremum.report.terminal import result_lines


@pytest.mark.parametrize(("value", "text"), [
    (0.06543, "0.0654"), (4.5, "4.50"), (16384, "16,384"), (145.2, "145"), (0, "0"), (None, "n/a"), (math.nan, "n/a"),
    (2.1e-6, "2.10e-06"), (-1.234, "-1.23"), (999.6, "1,000"),
])
def test_figures(value: float | None, text: str) -> None:
    assert words.figure(value) == text


@given(st.floats(1e-9, 1e12))
def test_a_figure_is_within_half_a_unit_of_its_last_digit(value: float) -> None:
    last = 10.0 ** (math.floor(math.log10(value)) - 2)
    assert abs(float(words.figure(value).replace(",", "")) - value) <= 0.5001 * last


@pytest.mark.parametrize(("value", "text"), [
    (0.41, "410 ms"), (12.34, "12.3 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (11_220, "3 h 07 min")])
def test_times(value: float, text: str) -> None:
    assert words.seconds(value) == text


def test_errors_have_two_significant_figures() -> None:
    assert words.plus_minus(0.065432, 0.00194) == "0.0654 ± 0.0019"
    assert words.plus_minus(24.612, 0.42) == "24.61 ± 0.42"
    assert words.plus_minus(24.612, None) == "24.6"


def test_what_swaps_and_training_bought_is_said_in_the_same_words() -> None:
    """0.05 nats in 90 s are 0.0333 a minute; 0.02 in two passes of 30 s, 0.02."""
    document: Any = build()
    document["result"]["swaps"] = {"trials": 9, "accepted": 2, "kl_before": 0.45, "kl_after": 0.4, "seconds": 90.0}
    document["result"]["gains"] = {"numbers": 1792, "kl_before": 0.22, "kl_after": 0.2,
                                   "passes": [{"kl": 0.205, "seconds": 30.0}, {"kl": 0.2, "seconds": 30.0}]}
    facts = {label: (value, means) for label, value, means in words.facts(document)}
    assert facts["Swapped formats"] == ("2 of 9 tried", "KL 0.450 to 0.400 in 1 min 30 s: 0.0333 a minute, on the "
                                        "candidates")
    assert facts["Trained gains and scales"] == ("1,792", "KL 0.220 to 0.200 in 1 min 00 s: 0.0200 a minute, 2 passes")


def test_the_verdict_names_who_vouches_for_it() -> None:
    document = build()
    assert "proved in llama.cpp" in words.verdict(document) and "1.23 bits" in words.verdict(document)
    assert words.attested(document["proof"]).startswith("Proved in llama.cpp (")
    assert words.attested({"runtime": "", "passed": True, "means": "read again"}) == "Read again."


@given(st.text(alphabet="ab \n", max_size=12), st.text(alphabet="ab \n", max_size=12))
def test_the_pieces_of_a_difference_make_the_texts_again(one: str, other: str) -> None:
    start, (word, rest), (other_word, other_rest) = words.first_difference(one, other)
    assert (start + word + rest, start + other_word + other_rest) == (one, other)
    if one != other:
        assert (word, rest) != (other_word, other_rest)


def test_limits_are_found_at_any_depth() -> None:
    found = {path: value["value"] for path, value in words.limit_values(build()["limits"])}
    assert found["information", "bits at kl", "0.05"] == 3.02
    assert words.with_unit({"value": 2.5e9, "unit": "bytes"}) == "2.50 GB"


def test_a_model_that_says_no_tokens_has_the_kl_of_its_hidden_states() -> None:
    document = build()
    measured, proof = document["result"]["measured"], document["proof"]
    assert not any("hidden" in line for line in result_lines(document, Path("x")))
    measured |= {"objective": "none", "perplexity": None, "same_top": None}
    proof["decode_tokens_per_second"] = 0.0
    said = "\n".join(result_lines(document, Path("x")))
    assert "KL of hidden states" in said and "KL, nats a token" not in said and "decode" not in said
    assert "same answer at 100 %" in said and "of the last hidden states from the original" in words.verdict(document)
    assert any(label == "KL of the hidden states" for label, *_ in words.facts(document))
    assert not any("decode" in name for name, _ in words.speeds(document))
