"""Tuning: each way trains what it says, adapters merge without a change, and the whole run on rows that can be learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from supremum.cli.common import to_json
from supremum.errors import StateError, SupremumError
from supremum.train.base import load as load_base
from supremum.train.baselines import baselines
from supremum.train.batches import Grouped
from supremum.train.recipe import load as load_recipe
from supremum.train.sections import Tune
from supremum.train.several import tune_several
from supremum.train.tasks import make
from supremum.train.tune import bare_words, leaks, splits, tune
from supremum.train.tuned import known
from supremum.train.watch import Watch
from supremum.train.ways import Unfreeze, Way, blocks, counts, merged, prepare
from tests.conftest import tiny_tokenizer

GOOD = ["the river opens the garden", "a letter answers the winter"]
BAD = ["stone counts stone", "the engine repairs a window"]


def recipe(folder: Path, model: Path, way: str = "full", **more: Any) -> Path:
    for name, times in (("train", 16), ("valid", 2), ("test", 8)):
        lines = [f"{text} {n}\t{label}" for n in range(times)
                 for label, texts in (("good", GOOD), ("bad", BAD)) for text in texts]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    settings = {"task": "classify", "model": str(model), "way": way, "batch": 8, "epochs": 3, "optimiser": {"lr": 3e-3},
                "data": {"train": "train.tsv", "valid": "valid.tsv", "test": "test.tsv",
                         "columns": {"text": 0, "label": 1}}} | more
    (folder / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / "recipe.yaml"


def based(tiny_model: Callable[..., Path], task: str = "classify", family: str = "bert") -> Any:
    made = make(task, {}, "r.yaml")
    made.labels = ["a", "b", "c"]
    return load_base(str(tiny_model(family)), made, 0)[0].eval()


def test_the_trunk_is_the_checkpoints(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModel

    one, other = based(tiny_model), AutoModel.from_pretrained(tiny_model("bert"))
    ids_BT = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(one.bert(ids_BT)[0], other.eval()(ids_BT)[0], atol=1e-6)
    assert one.config.num_labels == 3


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_merges_into_the_model_that_it_was(name: Any, family: str, tiny_model: Callable[..., Path]) -> None:
    plain = based(tiny_model, family=family)
    whole = sum(p.numel() for p in plain.parameters())
    kinds = {type(module) for module in plain.modules()}
    model, _ = prepare(plain, Way(name, rank=2), 10)
    trained, _ = counts(model)
    assert 0 < trained < 0.2 * whole
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        ids_BT = torch.arange(2, 10)[None]
        before = model.eval()(input_ids=ids_BT).logits
        out = merged(model).eval()
        assert torch.allclose(out(input_ids=ids_BT).logits, before, atol=1e-4)
    assert {type(module) for module in out.modules()} == kinds
    assert sum(p.numel() for p in out.parameters()) == whole


def test_lora_trains_what_its_formula_says(tiny_model: Callable[..., Path]) -> None:
    """Rank r adds r (I + O) parameters to each layer; head and pooler are trained whole."""
    plain = based(tiny_model)
    heads = sum(p.numel() for p in [*plain.classifier.parameters(), *plain.bert.pooler.parameters()])
    layer = 4 * 3 * (64 + 64) + 3 * (64 + 128) * 2  # q, k, v, o of 64 x 64; FFN 64 x 128 and back
    model, _ = prepare(plain, Way("lora", rank=3), 10)
    assert counts(model)[0] == heads + 2 * layer


def test_frozen_trains_the_head_and_its_features_stay(tiny_model: Callable[..., Path]) -> None:
    model, _ = prepare(based(tiny_model), Way("frozen"), 10)
    assert {name.split(".")[0] if not name.startswith("bert") else name.split(".")[1]
            for name, p in model.named_parameters() if p.requires_grad} == {"classifier", "pooler"}
    model.train()
    with torch.no_grad():
        ids_BT = torch.arange(8)[None]
        one, other = (model.bert(ids_BT).last_hidden_state for _ in range(2))
        assert torch.equal(one, other)
    with pytest.raises(SupremumError, match="adds none"):
        prepare(based(tiny_model, "instruct", "llama"), Way("frozen"), 10)


def test_gradual_unfreezing_goes_from_the_top_down(tiny_model: Callable[..., Path]) -> None:
    from types import SimpleNamespace

    model = based(tiny_model)
    callback = Unfreeze(model, 0.6, 10)  # three groups (two blocks, the embeddings) over six steps

    def moving(step: int) -> list[bool]:
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None)
        assert all(p.requires_grad for p in [*model.classifier.parameters(), *model.bert.pooler.parameters()])
        return [next(part.parameters()).requires_grad for part in (*reversed(blocks(model)), model.bert.embeddings)]

    assert [moving(step) for step in (0, 2, 4, 6)] == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]


def test_targets_that_name_no_layer_are_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(SupremumError, match=r"no linear layer ends in nothing"):
        prepare(based(tiny_model), Way("lora", targets=("nothing",)), 10)


@pytest.mark.parametrize("way", ["full", "lora", "adalora", "gradual"])
def test_rows_that_can_be_learnt_are_learnt_and_the_folder_is_plain(way: str, tiny_model: Callable[..., Path],
                                                                    tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from supremum.checkpoint import open_checkpoint

    done = tune(recipe(tmp_path, tiny_model("bert"), way), tmp_path, tmp_path / "out")
    ours, majority, bag, recurrent = done.lines
    assert recurrent.name == "LSTM" and 0 <= recurrent.metric.value <= 1
    assert ours.metric.value == 1.0 and majority.metric.value == 0.5 and bag.metric.value == 1.0
    assert "TF-IDF + logistic regression" in done.beaten  # level is not ahead
    assert done.trained == done.parameters if way in ("full", "gradual") else done.trained < done.parameters / 2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in (*GOOD, *BAD)]
    assert [model.config.id2label[number] for number in said] == ["good", "good", "bad", "bad"]
    assert open_checkpoint(tmp_path / "out").tensors
    document = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert document["lines"][0]["metric"]["value"] == 1.0 and document["way"] == way and document["skipped"] == []
    assert document["curve"][-1][0] == done.steps and document["curve"][-1][1] == done.loss
    assert document["level_with_or_behind"] == done.beaten and document == document | json.loads(to_json(done.to_dict()))
    assert not (tmp_path / "out.work").exists()
    stood = (tmp_path / "out" / "tune.json").stat().st_mtime_ns
    assert tune(tmp_path / "recipe.yaml", tmp_path, tmp_path / "out") == done  # finished: nothing is done again
    assert (tmp_path / "out" / "tune.json").stat().st_mtime_ns == stood
    with pytest.raises(SupremumError, match="another result"):
        tune(tmp_path / "recipe.yaml", tmp_path, tmp_path / "out", changes=["seed=5"])
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(StateError, match=r"model\.safetensors: is not as it was written"):
        tune(tmp_path / "recipe.yaml", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("changes, said", [
    (["way.rnk=2"], "way.rnk.*Did you mean way.rank"), (["task=clasify"], "Did you mean classify"),
    (["data.columns.txt=0"], "no column 'txt'"), (["task.stride=3"], "no setting 'stride'"),
    (["data.train=none.tsv"], "none.tsv: cannot be read"), (["untuned=true"], "adds no head"),
])
def test_recipes_that_cannot_be_are_refused(changes: list[str], said: str, tiny_model: Callable[..., Path],
                                            tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match=said):
        tune(recipe(tmp_path, tiny_model("bert")), tmp_path, tmp_path / "out", changes=changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "said"), [
    (["optimiser={name: sgd, epsilon: 1e-6}"], "optimiser.epsilon: sgd has none"), (["fsdp=true"], "fsdp: true"),
    (["model={family: bert}", "way=lora"], "way: lora changes part"), (["untuned=true"], "adds no head"),
    (["task=summarise", "data.columns={source: 0, target: 1}", "way=frozen"], "way: frozen trains a head alone"),
    (["task=summarise", "data.columns={source: 0, target: 1}", "source={train: a.tsv, reverse: 0.1}"], "source.reverse"),
    (["data.columns.txt=0"], "no column 'txt'"),
    pytest.param(["precision=fp16"], "fp16 needs a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine without a GPU")),
])
def test_settings_that_cannot_be_are_refused_before_rows_and_model_are_looked_at(changes: list[str], said: str,
                                                                                 tmp_path: Path) -> None:
    """There are neither rows nor a model: whoever read first would say so."""
    path = recipe(tmp_path, tmp_path / "no-model")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SupremumError, match=said):
        tune(path, tmp_path / "nothing", tmp_path / "out", changes=changes)
    several = json.loads(path.read_text())
    parts = {name: {"task": several["task"], "data": several["data"]} for name in ("a", "b")}
    path.write_text(json.dumps({"tasks": parts, "model": several["model"]}))
    if changes[0].startswith(("optimiser", "fsdp", "precision")):
        with pytest.raises(SupremumError, match=said):
            tune_several(path, tmp_path / "nothing", tmp_path / "out", changes=changes)


def test_an_adapter_without_its_library_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supremum.train.ways.find_spec", lambda name: None)
    with pytest.raises(SupremumError, match=r"recipe\.yaml: way: ia3 needs peft.*pip install"):
        tune(recipe(tmp_path, tmp_path / "no-model", "ia3"), tmp_path / "nothing", tmp_path / "out")


def test_scoring_alone_asks_nothing_of_the_optimiser(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_model("bert"), lstm=False)
    done = tune(path, tmp_path, tmp_path / "out", changes=["epochs=0", "optimiser={name: sgd, epsilon: 1e-6}"])
    assert done.steps == 0


def test_several_processes_are_refused(tiny_model: Callable[..., Path], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SupremumError, match=r"one process.*without torchrun"):
        tune(recipe(tmp_path, tiny_model("bert")), tmp_path, tmp_path / "out")


def test_the_rows_are_found_from_another_folder(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, tiny_model("bert"), lstm=False, epochs=0)
    monkeypatch.chdir(tmp_path)
    assert tune(path.name).path == path.stem  # --data and --out as `train` has them
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert known(tmp_path / path.stem, None, asked="evaluate", option="--data").as_tuned


def test_leaks_are_counted_apart_from_case_punctuation_and_spaces() -> None:
    task = make("classify", {}, "r.yaml")
    rows = [{"text": "THE RIVER, 3 times!"}, {"text": "a river"}, {"text": "好河。"}, {"text": ":-)"}, {"text": ":-("}]
    learnt = set(map(bare_words, ["The  River 3 times", "好 河", ":-)"]))
    assert leaks(task, learnt, test=rows, valid=rows[1:2]) == {"test": 3, "valid": 0}


def test_a_dialogue_s_rows_are_drawn_together(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": role, "content": f"{role} {n} {turn}"} for turn in range(3)
                           for role in ("user", "assistant")]} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "r.yaml").write_text("{task: instruct, model: demo, data: {train: a.jsonl}}")
    task = make("instruct", {}, "r.yaml")
    parts = splits(task, load_recipe(tmp_path / "r.yaml", Tune, []), tmp_path)
    where = [{row["where"] for row in part} for part in parts]
    assert [len(part) for part in parts] == [48, 6, 6] and sum(map(len, where)) == len(set.union(*where)) == 20


def test_what_else_the_model_learns_from_can_leak(tiny_model: Any, tmp_path: Path) -> None:
    """The rows of another domain, and of another task over the same trunk."""
    path = recipe(tmp_path, tiny_model("bert"), lstm=False, source={"train": ["test.tsv"], "alpha": 0.5}, epochs=0.1)
    found = tune(path, tmp_path, tmp_path / "out", changes=["data.train=valid.tsv"])
    assert found.leaks == {"valid": 8, "test": 32}
    assert known(tmp_path / "out", None, asked="evaluate", option="--data").leaked == 32
    one = json.loads(path.read_text())
    tasks = {name: {"task": "classify", "data": one["data"] | {"train": train}}
             for name, train in (("own", "valid.tsv"), ("other", "test.tsv"))}
    path.write_text(json.dumps({"tasks": tasks, "model": one["model"], "epochs": 0, "lstm": False}))
    assert tune_several(path, tmp_path, tmp_path / "both")["own"].leaks == {"valid": 8, "test": 32}


def test_grouped_draws_are_all_draws_once_and_less_padded() -> None:
    lengths = [int(n) for n in torch.randint(1, 60, (1000,), generator=torch.Generator().manual_seed(0))]
    drawn = [{"input_ids": [0] * n, "n": place} for place, n in enumerate(lengths)]
    grouped = Grouped(drawn, 8, 0)
    found = [grouped[place] for place in range(len(grouped))]
    assert sorted(one["n"] for one in found) == list(range(1000))

    def padded(rows: list[Any]) -> int:
        return sum(8 * max(len(one["input_ids"]) for one in rows[start : start + 8]) for start in range(0, 1000, 8))

    assert padded(found) < 1.05 * sum(lengths) < padded(drawn)
    assert [one["n"] for one in found[:400]] != [one["n"] for one in sorted(found[:400], key=lambda o: len(o["input_ids"]))]
    assert grouped[417]["n"] == Grouped(drawn, 8, 0)[417]["n"]  # whatever was read before


def test_baselines_by_hand() -> None:
    tag = make("tag", {}, "r.yaml")
    train = [{"words": ["a", "b"], "tags": ["O", "B-x"]}, {"words": ["b"], "tags": ["B-x"]}, {"words": ["b"], "tags": ["O"]}]
    assert baselines(tag, train, [{"words": ["b", "c", "a"]}]) == {"word's commonest tag": [["B-x", "O", "O"]]}
    answer = make("answer", {}, "r.yaml")
    row = {"question": "Who built the bridge?", "context": "The river is long. Anna built the bridge. It rains."}
    assert list(baselines(answer, [], [row]).values()) == [["Anna built the bridge."]]
    summary = make("summarise", {}, "r.yaml")
    assert list(baselines(summary, [], [{"source": "A. B. C. D."}]).values()) == [["A. B. C."]]


def test_the_tokenizer_without_padding_takes_its_end(tiny_model: Callable[..., Path]) -> None:
    assert tiny_tokenizer().pad_token_id == tiny_tokenizer().eos_token_id  # what decoders are padded with here
    model, tokenizer, _ = load_base(str(tiny_model("llama")), make("classify", {}, "r.yaml"), 0)
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("way", ["full", "frozen", "gradual", "lora", "adalora", "ia3", "prompt"])
def test_a_killed_run_ends_as_one_that_was_not(way: str, tiny_model: Callable[..., Path], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, tiny_model("bert"), way, checkpoint_every=4, lstm=False)
    tune(path, tmp_path, tmp_path / "whole")
    before = Watch.on_step_end

    def killed(self: Watch, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 18:  # of 24; AdaLoRA has cut its ranks by then
            raise KeyboardInterrupt
        return before(self, args, state, control, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watch, "on_step_end", killed)
        tune(path, tmp_path, tmp_path / "cut")
    assert (tmp_path / "cut.work" / "checkpoint-16").is_dir()
    tune(path, tmp_path, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_killed_run_goes_on_with_the_same_rows_only(tiny_model: Callable[..., Path], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrected label changes no count; a moved folder changes no row."""
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("supremum.train.tune.fit", killed)
    data = tmp_path / "data"
    data.mkdir()
    path = recipe(data, tiny_model("bert"), lstm=False, source={"train": "source.tsv", "alpha": 0.5})
    shutil.copy(data / "train.tsv", data / "source.tsv")
    with pytest.raises(KeyboardInterrupt):
        tune(path, data, tmp_path / "out")
    shutil.copytree(data, tmp_path / "moved")
    with pytest.raises(KeyboardInterrupt):  # goes on
        tune(path, tmp_path / "moved", tmp_path / "out")
    for name in ("train", "valid", "test", "source"):
        file = data / f"{name}.tsv"
        before = file.read_text()
        file.write_text(before.replace("\tgood\n", "\tbad\n", 1))
        with pytest.raises(StateError, match=r"\(rows changed"):
            tune(path, data, tmp_path / "out")
        file.write_text(before)
