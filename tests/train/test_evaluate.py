"""Tuned models scored by their task: every figure against stock libraries, every refusal with its remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from sklearn import metrics as sklearn
from typer.testing import CliRunner

from supremum.cli import app
from supremum.errors import SupremumError
from supremum.measure.intervals import bootstrap, compare_all, mean_interval, paired_bootstrap
from supremum.train.evaluate import evaluate_tuned
from supremum.train.tasks import make
from supremum.train.tune import tune
from tests.measure.test_evaluate import disturbed
from tests.train import test_scratch
from tests.train.test_tune import recipe


@pytest.fixture(scope="module")
def tuned(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier; `small` beside it is the same with noise in its weights and nothing that names its task."""
    folder = tmp_path_factory.mktemp("tuned")
    path, test = recipe(folder, tiny_model("bert"), lstm=False), folder / "test.tsv"
    lines = test.read_text().splitlines()  # some rows have the wrong label, so that flips go both ways
    test.write_text("\n".join(line if n % 5 else line.replace("good", "x").replace("bad", "good").replace("x", "bad")
                              for n, line in enumerate(lines)) + "\n")
    tune(path, folder, folder / "out")
    disturbed(folder / "out", folder / "small", 2.0)
    (folder / "small" / "tune.json").unlink()
    return folder / "out"


def probabilities(folder: Path, rows: list[list[str]]) -> tuple[list[str], np.ndarray]:
    """Of stock Transformers, row by row."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        chances = [model(**tokenizer(text, return_tensors="pt")).logits[0].double().softmax(-1).numpy() for text, _ in rows]
    return [model.config.id2label[int(one.argmax())] for one in chances], np.array(chances)


def test_figures_are_those_of_stock_libraries(tuned: Path) -> None:
    found = evaluate_tuned(tuned.parent / "small", tuned, seed=3)
    rows = [line.split("\t") for line in (tuned.parent / "test.tsv").read_text().splitlines()]
    truth = [label for _, label in rows]
    (said, chances), (before, _) = (probabilities(folder, rows) for folder in (tuned.parent / "small", tuned))
    right, was = ([a == b for a, b in zip(truth, one, strict=True)] for one in (said, before))
    assert 0.2 < sum(right) / len(right) < 0.9 and found.rows == found.total == len(rows) == 32
    figures = {name: one.value.value for name, one in found.scored.figures.items()}
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, said))
    assert figures["f1_macro"] == pytest.approx(sklearn.f1_score(truth, said, average="macro"))
    assert figures["mcc"] == pytest.approx(sklearn.matthews_corrcoef(truth, said))
    sure = chances.max(1)
    by_hand = 0.0
    for low in range(15):
        inside = (sure > low / 15) & (sure <= (low + 1) / 15)
        if inside.any():
            by_hand += inside.mean() * abs(np.array(right)[inside].mean() - sure[inside].mean())
    assert figures["ece"] == pytest.approx(by_hand, abs=1e-5)
    accuracy = found.scored.figures["accuracy"]
    assert accuracy.value == pytest.approx(mean_interval(right, seed=3))
    assert accuracy.reference is not None and accuracy.reference.value == np.mean(was)
    paired = paired_bootstrap(sklearn.accuracy_score, (truth, before), (truth, said), seed=3)
    assert accuracy.change is not None and (accuracy.change.low, accuracy.change.high, accuracy.change.p) == pytest.approx(
        (paired.low, paired.high, paired.p))
    lost, gained = sum(w and not r for r, w in zip(right, was, strict=True)), sum(
        r and not w for r, w in zip(right, was, strict=True))
    assert found.scored.flips == {"lost": lost, "gained": gained, "both": lost + gained,
                                  "p": pytest.approx(binomtest(gained, lost + gained).pvalue)}
    assert lost and gained
    assert found.scored.same == np.mean([a == b for a, b in zip(said, before, strict=True)])
    for label in found.scored.labels:
        assert label.f1.value.value == pytest.approx(sklearn.f1_score(truth, said, labels=[label.name], average="macro"))
        found_here = sum(true == one == label.name for true, one in zip(truth, said, strict=True))
        assert (label.cases, label.found) == (truth.count(label.name), found_here)
        assert label.gained is not None and label.lost is not None and label.found_reference is not None
        assert label.found - label.found_reference == label.gained - label.lost


def test_alone_it_scores_as_tune_did(tuned: Path) -> None:
    found, told = evaluate_tuned(tuned), json.loads((tuned / "tune.json").read_text())["lines"][0]
    accuracy = found.scored.figures["accuracy"]
    assert accuracy.value.to_dict() == told["metric"] and accuracy.change is None
    assert {name: one.value.value for name, one in found.scored.figures.items() if name != "ece"} == pytest.approx(
        told["scores"])
    assert found.scored.flips is None and found.leaked == json.loads((tuned / "tune.json").read_text())["leaks"]["test"]


def test_disturbed_rows_are_scored_once_more_and_samples_stay_what_they_are(tuned: Path) -> None:
    found = evaluate_tuned(tuned.parent / "small", tuned, disturb=["upper", "truncate"], samples=20)
    assert found.rows == 20 and found.total == 32 and set(found.perturbed) == {"upper", "truncate"}
    rows = [line.split("\t") for line in (tuned.parent / "test.tsv").read_text().splitlines()]
    places = sorted(np.random.default_rng(0).choice(32, 20, replace=False).tolist())
    said, _ = probabilities(tuned, [[rows[place][0].upper(), ""] for place in places])
    reference = found.perturbed["upper"].figures["accuracy"].reference
    assert reference is not None
    assert reference.value == np.mean([rows[place][1] == one for place, one in zip(places, said, strict=True)])


def test_the_rows_that_changed_most_are_explained(tuned: Path) -> None:
    found = evaluate_tuned(tuned.parent / "small", tuned, explained=2)
    rows = [line.split("\t") for line in (tuned.parent / "test.tsv").read_text().splitlines()]
    (_, now), (_, before) = (probabilities(folder, rows) for folder in (tuned.parent / "small", tuned))
    change = now[np.arange(32), before.argmax(1)] - before[np.arange(32), before.argmax(1)]
    assert sorted(abs(one.change) for one in found.explained) == pytest.approx(sorted(np.abs(change))[-2:], abs=1e-5)
    one = found.explained[0]
    line = int(one.where.rpartition(" ")[2]) - 1
    assert one.explained.true == rows[line][1] and one.change == pytest.approx(change[line], abs=1e-5)
    best = before[line].max()
    assert one.unit == "probability" and one.sure == pytest.approx(best + change[line], abs=1e-5)
    assert one.explained.reference is not None and one.explained.reference.log_p == pytest.approx(np.log(best), abs=1e-5)
    assert len(one.explained.model.shares) == len(one.explained.tokens) and one.explained.model.attention


@pytest.mark.parametrize("mistakes", [True, False])
def test_alone_the_surest_mistakes_are_explained_then_the_least_sure_rows(mistakes: bool, tuned: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from supremum.train.tasks.classify import Classify

    rows = [line.split("\t") for line in (tuned.parent / "test.tsv").read_text().splitlines()]
    said, chances = probabilities(tuned, rows)
    wrong = [place for place, (_, label) in enumerate(rows) if label != said[place]]
    sure_N, chosen = chances.max(1), range(32)
    if not mistakes:
        monkeypatch.setattr(Classify, "right", lambda self, truth, predictions: [True] * len(truth))
    found = evaluate_tuned(tuned, explained=2).explained
    lines = [int(one.where.rpartition(" ")[2]) - 1 for one in found]
    chosen = sorted(wrong, key=lambda at: -sure_N[at]) if mistakes else sorted(chosen, key=lambda at: sure_N[at])
    assert len(wrong) > 2 and [sure_N[at] for at in lines] == pytest.approx([sure_N[at] for at in chosen[:2]], abs=1e-5)
    for one, at in zip(found, lines, strict=True):
        assert (one.change, one.explained.reference, one.explained.kl, one.explained.likeness) == (None,) * 4
        assert one.explained.true == rows[at][1] and one.explained.target == said[at] == one.explained.model.top
        assert one.sure == pytest.approx(sure_N[at], abs=1e-5) == np.exp(one.explained.model.log_p)


def test_a_share_of_a_row_is_what_one_replacement_takes(tuned: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from supremum.measure.explain import Question, shares

    model = AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    ids, kinds = torch.arange(20, 27), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    found = shares(model, Question({"input_ids": ids[None], "token_type_ids": kinds}, range(7), "abcdefg",
                                   lambda output: output.logits[:, None], [1], "", "", lambda logits_1C: ""))
    with torch.no_grad():
        table = model.get_input_embeddings()
        x_1TD = table(ids[None]).clone()
        before = model(inputs_embeds=x_1TD, token_type_ids=kinds).logits.log_softmax(-1)[0, 1]
        x_1TD[0, 4] = table.weight.mean(0)
        after = model(inputs_embeds=x_1TD, token_type_ids=kinds).logits.log_softmax(-1)[0, 1]
    assert found[4] == pytest.approx(float(before - after), abs=1e-5)


def test_the_command_line_prints_writes_and_draws_it(tuned: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(tuned.parent / "small"), "--reference", str(tuned), "--perturb", "typos", "--explain", "1"]
    shown = CliRunner().invoke(app, [*words, "--page", str(tmp_path / "a.html")])
    assert shown.exit_code == 0, shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 80
    for expected in ("classify: 32 test rows", "accuracy", "ece", "McNemar", "label by label", "robustness", "weighed most"):
        assert expected in shown.output, expected
    page = (tmp_path / "a.html").read_text()
    for expected in ("Task: classify", "Label by label", "Robustness: accuracy", "attentiontask-0", "this model"):
        assert expected in page, expected
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert document["task"]["scored"]["flips"]["both"] > 0 and document["task"]["explained"][0]["explained"]["tokens"]
    alone = CliRunner().invoke(app, ["evaluate", str(tuned), "--explain", "1", "--page", str(tmp_path / "b.html")])
    assert alone.exit_code == 0 and "change" not in alone.output and "original" not in alone.output
    assert max(len(line) for line in alone.output.splitlines()) <= 80 and "weighed most" in alone.output
    page = (tmp_path / "b.html").read_text()
    assert "Task: classify" in page and "What the answers rest on" in page and "attentiontask-0" in page


def test_rows_that_moved_are_found_with_data(tuned: Path, tmp_path: Path) -> None:
    moved, data = tmp_path / "moved", tmp_path / "data"
    shutil.copytree(tuned, moved)
    shutil.copytree(tuned.parent, data, ignore=shutil.ignore_patterns("out*", "small*"))
    document = json.loads((moved / "tune.json").read_text())
    (moved / "tune.json").write_text(json.dumps(document | {"data": str(tmp_path / "gone")}))
    with pytest.raises(SupremumError, match=r"gone.*--data"):
        evaluate_tuned(moved)
    assert evaluate_tuned(moved, data=data) == evaluate_tuned(tuned)
    assert evaluate_tuned(tuned).as_tuned
    (data / "test.tsv").write_text((data / "test.tsv").read_text().replace("river", "stone"))
    assert not evaluate_tuned(moved, data=data).as_tuned
    (data / "test.tsv").write_text((data / "test.tsv").read_text().replace("good", "fine"))
    with pytest.raises(SupremumError, match="'fine' does not occur in the training rows"):
        evaluate_tuned(moved, data=data)


@pytest.mark.parametrize("words, said", [
    (["--cache", "q8_0"], "--cache has no part"), (["--tasks", "a.jsonl"], "--tasks has no part"),
    (["--tokens", "512"], "--tokens has no part"), (["--length", "64"], "--length has no part"),
    (["--details"], "--details has no part"), (["--dtype", "bfloat16"], "--dtype has no part"),
    (["--text", "a.txt", "--data", "."], "without --text"), (["--perturb", "noise"], "no way to disturb"),
    (["--data", "gone"], "--data"),
])
def test_what_makes_no_sense_is_refused(words: list[str], said: str, tuned: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tuned), *words])
    assert result.exit_code in (1, 2) and said in " ".join(result.output.replace("│", " ").split()), result.output


def test_models_that_cannot_be_compared_are_refused(tuned: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    plain = str(tiny_model("bert"))
    with pytest.raises(SupremumError, match="has no head for the task classify"):
        evaluate_tuned(plain, tuned)
    with pytest.raises(SupremumError, match="neither it nor the reference was tuned"):
        evaluate_tuned(plain)
    result = CliRunner().invoke(app, ["evaluate", plain, "--data", str(tmp_path)])
    assert result.exit_code == 2 and "--reference" in result.output
    other = tmp_path / "other"
    path, test = recipe(tmp_path, tiny_model("bert"), lstm=False, epochs=0), tmp_path / "test.tsv"
    shutil.copy(tuned.parent / "test.tsv", test)
    tune(path, tmp_path, other)
    found = evaluate_tuned(other, tuned)  # the same rows elsewhere
    alone = evaluate_tuned(tuned).scored.figures["accuracy"].value
    assert found.as_tuned and found.scored.figures["accuracy"].reference == alone
    test.write_text(test.read_text().replace("river", "stone"))
    with pytest.raises(SupremumError, match=r"different test rows \(32 and 32\)"):
        evaluate_tuned(other, tuned)
    for name in ("train", "valid", "test"):
        file = tmp_path / f"{name}.tsv"
        file.write_text(file.read_text().replace("\tgood", "\tfine"))
    tune(tmp_path / "recipe.yaml", tmp_path, tmp_path / "labels")
    with pytest.raises(SupremumError, match=r"classify with the labels bad, fine, .* labels bad, good"):
        evaluate_tuned(tmp_path / "labels", tuned)
    with pytest.raises(SupremumError, match="its head has other labels"):
        shutil.copytree(tmp_path / "labels", tmp_path / "bare", ignore=shutil.ignore_patterns("tune.json"))
        evaluate_tuned(tmp_path / "bare", tuned)
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "tune.json").write_text('{"tasks": {"a": {}, "b": {}}, "inputs": {}}')
    with pytest.raises(SupremumError, match=r"several tasks. Name one of them: .*a, .*b\."):
        evaluate_tuned(tmp_path / "several")


def test_what_cannot_be_explained_or_scored_is_refused_before_or_at_once(tuned: Path, tmp_path: Path) -> None:
    for name in ("tokens", "broken"):
        shutil.copytree(tuned, tmp_path / name)
    place = tmp_path / "tokens" / "tokenizer.json"
    tokenizer = json.loads(place.read_text())
    tokenizer["model"]["vocab"] = {f"{word}x" if number == 40 else word: number
                                   for word, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["merges"] = []
    place.write_text(json.dumps(tokenizer))
    with pytest.raises(SupremumError, match="have different tokens"):
        evaluate_tuned(tmp_path / "tokens", tuned, explained=1)
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["classifier.weight"].fill_(3e38)
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SupremumError, match="32 of 32 rows get no finite answer"):
        evaluate_tuned(tmp_path / "broken", tuned)
    with pytest.raises(SupremumError, match="nowhere"):
        evaluate_tuned(tmp_path / "nowhere", tuned)


def test_vectors_of_a_base_with_a_head_are_its_trunks(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The base of `tune` is such a model: nothing trained, its figures are the same."""
    base = tiny_model("bert")
    tune(recipe(tmp_path, base, lstm=False, task="embed", epochs=0), tmp_path, tmp_path / "out")
    changes = [one.change for one in evaluate_tuned(base, tmp_path / "out").scored.figures.values()]
    assert changes and all(change is not None and change.value == pytest.approx(0, abs=1e-6) for change in changes)


TAGS = [["B-a", "I-a", "O"], ["O", "B-b", "O"], ["B-a", "O", "B-b"], ["O", "O", "B-a"]]
TEXTS = [["the red dog runs home"], ["a small house", "one small house"], ["it rains in the north"], ["no"]]
CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "classify": (["a", "b", "c", "a"], ["a", "c", "c", "b"]), "pairs": (["a", "b", "b"], ["b", "b", "b"]),
    "tag": (TAGS, [["B-a", "I-a", "O"], ["O", "B-a", "O"], ["B-a", "O", "O"], ["O", "O", "B-a"]]),
    "answer": (TEXTS, ["red dog", "one small house", "", "no"]),
    "translate": (TEXTS, ["the red dog ran home", "a small house", "rain in the north sea", ""]),
    "summarise": (TEXTS, ["the red dog ran home", "a small house", "rain in the north sea", "yes"]),
}


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("name", CASES)
def test_what_intervals_draw_is_the_score_of_the_rows_drawn(name: str) -> None:
    """On the whole and on every draw: the figures of rows' parts against the libraries' own, which read the rows again."""
    task, (truth, said) = make(name, {}, "r.yaml"), CASES[name]
    task.labels = sorted({tag for row in TAGS for tag in row}) if name == "tag" else ["a", "b", "c"]
    parts, metric = task.figures(truth, said)
    by_label = task.by_label(truth, said)
    draw = np.random.default_rng(0)
    for picks in [np.arange(len(truth)), *(draw.integers(len(truth), size=(40, len(truth))))]:
        rows, answers = [truth[place] for place in picks], [said[place] for place in picks]
        figures, score = metric(parts[picks]), task.score(rows, answers)
        assert figures == pytest.approx({key: score[key] for key in figures})
        if name in ("classify", "pairs") and by_label:
            of_labels = by_label[1](by_label[0][picks])
            for label in {*rows, *answers}:
                expected = sklearn.f1_score(rows, answers, labels=[label], average="macro", zero_division=0)
                assert of_labels[label] == pytest.approx(expected)
    figure = task.metric
    one = bootstrap(task.score, truth, said, key=figure, resamples=50, seed=1)
    assert compare_all(metric, [parts], resamples=50, seed=1)[figure].value == pytest.approx(one)


def test_entities_found_and_lost_by_hand() -> None:
    task, (truth, said) = make("tag", {}, "r.yaml"), CASES["tag"]
    task.labels = ["B-a", "B-b", "I-a", "O"]
    hits = task.hits(truth, said)
    assert [len(part) for part in hits["a"]] == [3, 3] and [len(part) for part in hits["b"]] == [2, 0]
    parts, f1 = task.by_label(truth, said) or (None, None)
    assert f1 is not None and f1(parts) == pytest.approx({"a": 2 * 3 / (3 + 4), "b": 0.0})  # type: ignore[arg-type]
    assert task.right(truth, said) == [True, False, False, True]
    row = {"words": ["Red", "dog", "here", "now"], "tags": ["B-a", "I-a", "O", "O"]}
    assert task.disturbed(row, "truncate", "0") == {"words": ["here", "now"], "tags": ["O", "O"]}
    assert task.disturbed(row, "upper", "0")["words"] == ["RED", "DOG", "HERE", "NOW"]


def test_an_encoder_decoder_from_scratch_is_scored(tmp_path: Path) -> None:
    """BLEU and chrF of a translation, which no window of text can measure."""
    done = tune(test_scratch.recipe(tmp_path, epochs=4), tmp_path, tmp_path / "out")
    disturbed(tmp_path / "out", tmp_path / "small", 0.3)
    (tmp_path / "small" / "tune.json").unlink()
    found = evaluate_tuned(tmp_path / "small", tmp_path / "out", disturb=["upper"])
    bleu = found.scored.figures["bleu"]
    assert bleu.reference == done.lines[0].metric and bleu.value.value != bleu.reference.value
    assert set(found.scored.figures) == {"bleu", "chrf"} and "bleu_signature" in found.scored.more
    assert found.scored.flips is None and not found.scored.labels and found.perturbed["upper"].figures["bleu"].change
    out, small, page = str(tmp_path / "out"), str(tmp_path / "small"), tmp_path / "a.html"
    shown = CliRunner().invoke(app, ["evaluate", out, "--page", str(page)])
    assert shown.exit_code == 0 and "bleu_signature" in shown.output and "Task: translate" in page.read_text()
    shown = CliRunner().invoke(app, ["evaluate", small, "--reference", out, "--explain", "2", "--page", str(page)])
    said = " ".join(shown.output.split())
    assert shown.exit_code == 0 and max(map(len, shown.output.splitlines())) <= 80, shown.output
    assert "log p, nats a token" in said and "weighed most: original" in said and "attentiontask-1" in page.read_text()
    asked = evaluate_tuned(tmp_path / "small", tmp_path / "out", explained=20).explained
    changes = [abs(one.change) for one in asked if one.change is not None]
    assert len(asked) == 20 and changes == sorted(changes, reverse=True) and changes[0] > 0.01


@pytest.mark.parametrize("task, family", [("embed", "bert"), ("tag", "bert"), ("answer", "bert"), ("instruct", "llama")])
def test_every_task_is_scored_as_tune_scored_it(task: str, family: str, tiny_model: Callable[..., Path],
                                                tmp_path: Path) -> None:
    data: dict[str, Any] = {}
    for name in ("train", "valid", "test"):
        if task == "tag":
            data[name] = f"{name}.conll"
            (tmp_path / data[name]).write_text("The O\nriver B-x\n\nstone B-y\nmoves O\n\n" * 6)
        elif task == "answer":
            data[name] = f"{name}.json"
            asked = [{"question": f"Who opens {n}?", "answers": [{"text": "river", "answer_start": 4}]} for n in range(6)]
            (tmp_path / data[name]).write_text(json.dumps({"data": [{"paragraphs": [
                {"context": "The river opens the garden.", "qas": asked}]}]}))
        elif task == "instruct":
            data[name] = f"{name}.jsonl"
            (tmp_path / data[name]).write_text("".join(
                json.dumps({"source": f"the river {n}", "target": "a stone"}) + "\n" for n in range(6)))
    settings: dict[str, Any] = {"task": task, "epochs": 0} | ({"data": data} if data else {})
    if task == "instruct":
        settings["task"] = {"name": "instruct", "length": 48, "new": 8}
    if task == "answer":
        settings["task"] = {"name": "answer", "length": 64, "stride": 16}
    path = recipe(tmp_path, tiny_model(family), lstm=False, **settings)
    done = tune(path, tmp_path, tmp_path / "out")
    found = evaluate_tuned(tmp_path / "out", tmp_path / "out", disturb=["typos", "truncate"])
    figure = found.scored.figures[done.metric]
    assert figure.value == figure.reference and figure.change is not None and figure.change.value == 0
    assert figure.value.value == pytest.approx(done.lines[0].metric.value)
    if task != "tag":  # whose intervals `tune` draws fewer times
        assert figure.value == pytest.approx(done.lines[0].metric)
    assert {**{name: one.value.value for name, one in found.scored.figures.items()}, **found.scored.more} == pytest.approx(
        done.lines[0].scores)
    assert found.scored.flips in (None, {"lost": 0, "gained": 0, "both": 0, "p": 1.0})
    assert bool(found.scored.labels) == (task == "tag") and found.perturbed.keys() == {"typos", "truncate"}
    if task == "embed":
        refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), "--explain", "1"])
        assert refused.exit_code == 1 and "task embed gives no such answer" in " ".join(refused.output.split())
    else:
        same = evaluate_tuned(tmp_path / "out", tmp_path / "out", explained=1).explained[0]
        assert same.change == 0 == same.explained.kl and same.explained.likeness == pytest.approx(1)
        assert same.explained.model == same.explained.reference and any(same.explained.model.shares)
        alone = evaluate_tuned(tmp_path / "out", explained=1).explained[0]
        assert alone.explained.reference is None and len(alone.explained.tokens) == len(alone.explained.model.shares)
    words = ["evaluate", str(tmp_path / "out"), "--perturb", "lower", "--page", str(tmp_path / "a.html")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    one = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), "--samples", "1"])
    assert (one.exit_code, "cannot be compared as clusters" in one.output) == ((1, True) if task == "embed" else (0, False))
    if task == "instruct":  # a language model still has a quality on text
        (tmp_path / "t.txt").write_text("The river moves the stone. " * 40)
        words = ["evaluate", str(tmp_path / "out"), "--text", str(tmp_path / "t.txt"), "--tokens", "64", "--length", "16"]
        assert "perplexity" in CliRunner().invoke(app, words).output
        refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), "--tokens", "64"])
        assert refused.exit_code == 2 and "--text" in refused.output
