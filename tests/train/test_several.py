"""Several tasks: the loss by its definition, one trunk for all, and folders that open in Transformers as plain models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from supremum.errors import StateError, SupremumError
from supremum.train.base import load as load_base
from supremum.train.evaluate import evaluate_tuned
from supremum.train.several import Together, rows_of_each, share, tune_several
from supremum.train.tasks import make
from supremum.train.ways import Way, prepare, trunk
from tests.train.test_tune import BAD, GOOD, recipe


def models_of(tiny_model: Callable[..., Path], family: str = "bert", names: tuple[str, ...] = ("classify", "tag")) -> Any:
    tasks = [make(name, {}, "r.yaml") for name in names]
    for task in tasks:
        task.labels = ["a", "b", "c"]
    models = [load_base(str(tiny_model(family)), task, 0)[0].eval() for task in tasks]
    share(models, names)
    return models, tasks


def batches(names: tuple[str, ...] = ("classify", "tag")) -> dict[str, Any]:
    ids_BT = torch.arange(2, 18).view(2, 8)
    labels = {"classify": torch.tensor([0, 2]), "tag": ids_BT % 3, "instruct": ids_BT}
    return {name: {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels[name]} for name in names}


def test_the_loss_is_the_weighted_mean_and_reaches_one_trunk(tiny_model: Callable[..., Path]) -> None:
    models, tasks = models_of(tiny_model)
    together, inputs = Together(models, tasks, ("classify", "tag"), (1.0, 3.0)).eval(), batches()
    one, other = (float(model(**inputs[name]).loss) for model, name in zip(models, inputs, strict=True))
    loss = together(inputs)
    assert float(loss) == pytest.approx((one + 3 * other) / 4)
    loss.backward()
    weight = trunk(models[1]).encoder.layer[0].output.dense.weight
    assert weight is trunk(models[0]).encoder.layer[0].output.dense.weight and weight.grad.abs().max() > 0
    shared = {id(p) for p in trunk(models[1]).parameters()}
    found = [id(p) for p in together.parameters()]
    assert len(found) == len(set(found)) and shared <= set(found)
    assert {id(p) for model in models for p in model.parameters()} == set(found)


@pytest.mark.parametrize("family, names", [("bert", ("classify", "tag")), ("qwen2", ("instruct", "classify"))])
def test_its_state_comes_back_from_safetensors(family: str, names: tuple[str, ...], tiny_model: Callable[..., Path],
                                               tmp_path: Path) -> None:
    """A qwen2 has tied tables; safetensors refuses tensors that share memory."""
    models, tasks = models_of(tiny_model, family, names)
    together = Together(models, tasks, names, (1.0, 1.0))
    save_file(together.state_dict(), tmp_path / "s.safetensors")
    before = {name: float(model(**batches(names)[name]).loss) for name, model in zip(names, models, strict=True)}
    with torch.no_grad():
        for parameter in together.parameters():
            parameter.zero_()
    together.load_state_dict(load_file(tmp_path / "s.safetensors"), strict=False)
    assert {name: float(model(**batches(names)[name]).loss) for name, model in zip(names, models, strict=True)} == before


def test_an_adapter_in_the_trunk_is_every_tasks(tiny_model: Callable[..., Path]) -> None:
    models, _ = models_of(tiny_model)
    with torch.no_grad():
        before = models[1](**batches()["tag"]).logits
        models[0], _ = prepare(models[0], Way("lora", rank=2), 10)
        for name, parameter in models[0].named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
        assert not torch.allclose(models[1].eval()(**batches()["tag"]).logits, before, atol=1e-3)
        after = models[1](**batches()["tag"]).logits
        models[0].merge_and_unload()
        assert torch.allclose(models[1](**batches()["tag"]).logits, after, atol=1e-4)
    assert not [name for name, _ in models[1].named_parameters() if "lora" in name]


def test_no_task_is_seen_less_than_once() -> None:
    rows = rows_of_each({"a": [1, 2, 3], "b": [7, 8]})
    assert [row["a"] for row in rows] == [1, 2, 3] and [row["b"] for row in rows] == [7, 8, 7]


def written(folder: Path, model: Path, **more: Any) -> Path:
    recipe(folder, model)
    for name, times in (("train", 16), ("valid", 2), ("test", 4)):
        lines = [f"{one} {n}\t{other}\t{'same' if (one in GOOD) == (other in GOOD) else 'other'}" for n in range(times)
                 for one in (GOOD[0], BAD[0]) for other in (GOOD[1], BAD[1])]
        (folder / f"pairs-{name}.tsv").write_text("\n".join(lines) + "\n")
    files = {name: f"{name}.tsv" for name in ("train", "valid", "test")}
    columns = {"text": 0, "second": 1, "label": 2}
    settings = {"model": str(model), "batch": 8, "epochs": 3, "optimiser": {"lr": 3e-3}, "tasks": {
        "mood": {"task": "classify", "data": files | {"columns": {"text": 0, "label": 1}}},
        "same": {"task": {"name": "pairs", "length": 40}, "weight": 2, "data": {
            name: f"pairs-{file}" for name, file in files.items()} | {"columns": columns}}}} | more
    (folder / "several.yaml").write_text(json.dumps(settings))
    return folder / "several.yaml"


@pytest.mark.parametrize("way", ["full", "lora"])
def test_each_folder_is_a_plain_model_with_the_same_trunk(way: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    done = tune_several(written(tmp_path, tiny_model("bert"), way=way, checkpoint_every=8), tmp_path, tmp_path / "out")
    assert list(done) == ["mood", "same"] and done["mood"].lines[0].metric.value == 1.0
    assert done["same"].lines[0].metric.value > 0.5
    weights = [load_file(tmp_path / "out" / name / "model.safetensors") for name in done]
    heads = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert {name.split(".")[0] if "pooler" not in name else "pooler" for name in heads} == {"classifier", "pooler"}
    for name, one in done.items():
        folder = tmp_path / "out" / name
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), \
            AutoTokenizer.from_pretrained(folder)
        rows = [line.split("\t") for line in
                (tmp_path / ("test.tsv" if name == "mood" else "pairs-test.tsv")).read_text().splitlines()]
        right = [model.config.id2label[int(model(**tokenizer(*texts, return_tensors="pt")).logits.argmax())] == label
                 for *texts, label in rows]
        assert sum(right) / len(right) == pytest.approx(one.lines[0].metric.value)
        stored = json.loads((folder / "tune.json").read_text())["inputs"]["recipe"]
        assert stored["task"]["name"] == one.task and "tasks" not in stored
    assert list(json.loads((tmp_path / "out" / "tune.json").read_text())["tasks"]) == ["mood", "same"]
    assert tune_several(tmp_path / "several.yaml", tmp_path, tmp_path / "out") == done  # finished: nothing is done again
    for name, one in done.items():
        found = evaluate_tuned(tmp_path / "out" / name, tmp_path / "out" / name, explained=1)
        assert found.as_tuned and found.scored.figures["accuracy"].value == one.lines[0].metric
        assert found.explained[0].change == 0 and found.explained[0].explained.likeness == pytest.approx(1)
    with pytest.raises(SupremumError, match=r"several tasks\. Name one of them: .*mood, .*same"):
        evaluate_tuned(tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("changes, said", [
    (["way=adalora"], "adalora is for one task alone"), (["tasks.mood.wieght=2"], "Did you mean tasks.mood.weight"),
    (["tasks.same.weight=0"], "above 0"), (["tasks.mood.task.name=clasify"], "Did you mean classify"),
    (["tasks={}"], "two tasks or more"),
])
def test_recipes_that_cannot_be_are_refused(changes: list[str], said: str, tiny_model: Callable[..., Path],
                                            tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match=said):
        tune_several(written(tmp_path, tiny_model("bert")), tmp_path, tmp_path / "out", changes=changes)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_with_the_same_rows_only(tiny_model: Callable[..., Path], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("supremum.train.several.fit", killed)
    path = written(tmp_path, tiny_model("bert"))
    with pytest.raises(KeyboardInterrupt):
        tune_several(path, tmp_path, tmp_path / "out")
    file = tmp_path / "pairs-train.tsv"
    file.write_text(file.read_text().replace("\tsame\n", "\tother\n", 1))
    with pytest.raises(StateError, match=r"\(rows changed"):
        tune_several(path, tmp_path, tmp_path / "out")
