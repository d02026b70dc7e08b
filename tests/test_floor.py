"""The floor: bisection finds the threshold, the file's score is what stock Transformers gives, and a miss loses nothing."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from supremum import Budget
from supremum import floor as module
from supremum.cli import app
from supremum.errors import BudgetError, SupremumError
from supremum.floor import Floor, Judge, optimize_floor
from supremum.limits import measure
from supremum.report import read_document
from supremum.report.terminal import result_lines
from supremum.report.words import budget, facts
from supremum.train.evaluate import evaluate_tuned
from supremum.train.tune import tune
from tests.test_pipeline import TOKENS, text  # noqa: F401  (the fixture)
from tests.train.test_tune import recipe

machine = functools.cache(measure)  # seconds each


@pytest.fixture(scope="module")
def tuned(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    tune(recipe(folder, tiny_model("bert"), lstm=False), folder, folder / "out")
    return folder / "out"


def lower(model: Path, text: str, out: Path, floor: str, given: Budget | None = None, **options: Any) -> Any:  # noqa: F811
    return optimize_floor(model, Floor.parse(floor), given, target="compressed-tensors", text=[text], tokens=TOKENS, out=out,
                          dtype="float32", **options)


@pytest.fixture(scope="module")
def lowered(tuned: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEP", 2.0)
        patch.setattr("supremum.pipeline.rehearse", lambda *_: None)  # the proof at the end is real
        patch.setattr("supremum.pipeline.measure_machine", machine)
        return lower(tuned, text, tmp_path_factory.mktemp("floor") / "out", "accuracy=0.99x")


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_bisection_finds_the_threshold_in_log_tries(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Budget(bits=number + 1) for number in range(count)]
    for threshold in range(count + 1):  # the first point that holds; `count`: none does
        monkeypatch.setattr(module, "_score", lambda found, judge, point, split: {
            "metric": {"value": 0.8 if point.bits - 1 >= threshold else 0.78}, "bytes": 1,  # noqa: B023
            "change": {"low": -0.01, "high": 0.01}})
        monkeypatch.setattr(module, "_drop", lambda found, point: dropped.append(point))  # noqa: B023
        tried: list[dict[str, Any]] = []
        dropped: list[Budget] = []
        judge: Any = SimpleNamespace(floor=Floor("accuracy", 1, False))
        best = module._search(None, judge, points, 0.79, tried, searched=True)  # type: ignore[arg-type]
        assert best == (points[threshold] if threshold < count else None)
        assert len(tried) <= math.ceil(math.log2(count + 1))
        assert best not in dropped and all(point["held"] == (point["value"] > 0.79) for point in tried)
        assert module._search(None, judge, points, 0.796, [], searched=True) is None  # type: ignore[arg-type]


def test_the_chosen_file_scores_as_stock_transformers_says(lowered: Any, tuned: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    document = read_document(lowered.folder)
    floor = document["result"]["floor"]
    assert floor["asked"] == "accuracy=0.99x" and floor["least"] == pytest.approx(0.99 * floor["original"]["valid"]["value"])
    held = [point for point in floor["tried"] if point["held"]]
    assert document["budget"]["bits"] == min(point["bits"] for point in held)
    assert all(point["held"] == (point["value"] - point["error"] >= floor["least"]) for point in floor["tried"])
    assert document["proof"]["passed"] and floor["rows"] == {"valid": 8, "test": 32}
    model = AutoModelForSequenceClassification.from_pretrained(lowered.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(lowered.folder)
    for name in ("valid", "test"):
        rows = [line.split("\t") for line in (tuned.parent / f"{name}.tsv").read_text().splitlines()]
        right = [model.config.id2label[int(model(**tokenizer(words, return_tensors="pt")).logits.argmax())] == label
                 for words, label in rows]
        assert floor["reached"][name]["value"] == pytest.approx(sum(right) / len(right))  # type: ignore[literal-required]
        change = floor["change"][name]  # type: ignore[literal-required]
        assert change["low"] <= change["value"] <= change["high"]
    scored = evaluate_tuned(lowered.folder, tuned).scored.figures["accuracy"]
    assert scored.value.to_dict() == floor["reached"]["test"] and scored.reference is not None
    assert scored.reference.to_dict() == floor["original"]["test"]
    assert scored.change is not None and scored.change.to_dict() == pytest.approx(floor["change"]["test"])
    refused = CliRunner().invoke(app, ["evaluate", str(lowered.folder)])
    assert refused.exit_code == 1 and "--reference" in refused.output
    assert "--floor accuracy=0.99x" in document["command"] and "--bits" not in document["command"]
    assert "accuracy at least" in budget(document)
    assert any("32 test rows" in label for label, *_ in facts(document))
    assert any(line.startswith("accuracy, test") for line in result_lines(document, lowered.folder))
    assert not lowered.folder.with_name("out.work").exists()


def test_it_is_not_done_twice(lowered: Any, tuned: Path, text: str, tmp_path: Path,  # noqa: F811
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "statistics", lambda *_: pytest.fail("nothing is left to do"))
    assert lower(tuned, text, lowered.folder, "accuracy=0.99x").document == read_document(lowered.folder)
    with pytest.raises(SupremumError, match="another result"):
        lower(tuned, text, lowered.folder, "accuracy=0.98x")
    other = tmp_path / "other"
    shutil.copytree(tuned.parent, other, ignore=shutil.ignore_patterns("out*"))
    assert lower(tuned, text, lowered.folder, "accuracy=0.99x", data=other).document == read_document(lowered.folder)
    for name in ("valid", "test"):  # the same labels, other words
        (other / f"{name}.tsv").write_text((tuned.parent / f"{name}.tsv").read_text().replace("river", "stone"))
        with pytest.raises(SupremumError, match="another result"):
            lower(tuned, text, lowered.folder, "accuracy=0.99x", data=other)
        shutil.copy(tuned.parent / f"{name}.tsv", other)


def test_a_missed_floor_says_by_how_much_and_loses_nothing(tuned: Path, text: str, tmp_path: Path, lowered: Any,  # noqa: F811
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    proof = SimpleNamespace(asdict=lambda: lowered.document["proof"])
    monkeypatch.setattr("supremum.pipeline.rehearse", lambda *_: None)
    monkeypatch.setattr("supremum.pipeline.measure_machine", machine)
    monkeypatch.setattr("supremum.pipeline.verify", lambda *_, **__: proof)
    with monkeypatch.context() as patch:
        worse = {"metric": {"value": 0.25, "low": 0.1, "high": 0.4}, "change": {"value": -0.75, "low": -0.9, "high": -0.6}}
        patch.setattr(Judge, "score", lambda self, written, split: worse)
        with pytest.raises(BudgetError, match=r"was missed: it has accuracy 0\.25 on the 8 valid rows") as refused:
            lower(tuned, text, tmp_path / "out", "accuracy=0.99x", Budget(bits=9))
    assert "out.work" in str(refused.value) and not (tmp_path / "out").exists()
    for place in ("reach", "solve.gains"):
        monkeypatch.setattr(f"supremum.{place}.streamed_quality", lambda *_: pytest.fail("was measured before"))
    done = lower(tuned, text, tmp_path / "out", "accuracy=0.2", Budget(bits=9))
    floor = done.document["result"]["floor"]
    assert floor["held_on_test"] == (floor["reached"]["test"]["value"] >= 0.2)
    assert not floor["searched"] and len(floor["tried"]) == 1 and floor["reached"]["valid"]["value"] == 0.25
    assert floor["reached"]["test"]["value"] > 0.25
    assert "--bits 9 --floor accuracy=0.2" in done.document["command"]
    assert not (tmp_path / "out.work").exists()


def test_floors_that_cannot_be_are_refused(tuned: Path, tiny_model: Callable[..., Path], text: str,  # noqa: F811
                                           tmp_path: Path) -> None:
    def refused(said: str, floor: str, model: Path = tuned, **options: Any) -> None:
        with pytest.raises(SupremumError, match=said):
            lower(model, text, tmp_path / "out", floor, **options)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()

    refused(r"holds no tune\.json.*supremum tune", "accuracy=0.99x", tiny_model("bert"))
    refused(r"classify has no bleu\. It has accuracy, ", "bleu=20")
    refused(r"the original itself has mcc", "mcc=1.5")
    refused(r"--floor-data", "accuracy=0.9x", data=tmp_path / "none")
    moved = tmp_path / "moved"
    shutil.copytree(tuned, moved)
    document = json.loads((moved / "tune.json").read_text())
    for change, said in (({"data": str(tmp_path / "gone")}, "are not in .*gone.*--floor-data"),
                         ({"labels": ["x", "y"]}, "labels bad, good, the model has x, y"), ({"inputs": 3}, "is damaged")):
        (moved / "tune.json").write_text(json.dumps(document | change))
        refused(said, "accuracy=0.9x", moved)
