"""Objectives against their definitions, and whole small trainings of every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.text.packed import read_index
from supremum.text.packing import pack
from supremum.train import watch
from supremum.train.corpus import TokenizerRecipe, chunks, make_tokenizer, packed_chunks
from supremum.train.examples import Drawn
from supremum.train.learnt import trained_on
from supremum.train.models import FAMILIES, Model, build, multiplied
from supremum.train.objectives import Hide, Objective, Pad, next_loss, sentinels
from supremum.train.pairs import _Encoder
from supremum.train.pretrain import train

WORDS = ["river", "stone", "teacher", "engine", "window", "garden", "letter", "market"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 30))}) for _ in range(60)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    return folder


def made(data: Path, objective: str, name: str = "bpe") -> Any:
    return make_tokenizer(TokenizerRecipe(name, 300), [data / "t.jsonl"], objective, 64)


def test_chunks_are_the_text_with_ends(data: Path) -> None:
    tokenizer = made(data, "causal", "characters")
    joined = chunks(tokenizer, [data / "t.jsonl"], 32, "joined", "causal")
    texts = [json.loads(line)["text"] for line in (data / "t.jsonl").read_text().splitlines()]
    everything = "".join(text + "<|end|>" for text in texts)
    seen = tokenizer.decode(np.concatenate([joined[i]["ids"] for i in range(len(joined))]))
    assert everything.startswith(seen) and len(joined) == sum(len(t) + 1 for t in texts) // 32
    apart = chunks(tokenizer, [data / "t.jsonl"], 32, "separate", "causal")
    assert all("<|end|>" not in tokenizer.decode(apart[i]["ids"]) for i in range(len(apart)))
    kept, held = joined.split(0.1)
    assert len(held) == round(0.1 * len(joined)) and len(kept) + len(held) == len(joined)


def test_masking_keeps_its_rates_and_whole_words(data: Path) -> None:
    tokenizer = made(data, "masked")
    examples = chunks(tokenizer, [data / "t.jsonl"], 64, "joined", "masked")
    hide = Hide(Objective("masked", rate=0.15), tokenizer)
    hidden = masked = kept = total = 0
    for draw in range(400):
        example = examples[draw % len(examples)]
        out = hide(example, np.random.default_rng(draw))
        places = out["labels"] != -100
        ordinary = ~np.isin(example["ids"], tokenizer.all_special_ids)
        assert not (places & ~ordinary).any() and (out["labels"][places] == example["ids"][places]).all()
        assert (out["input_ids"][~places] == example["ids"][~places]).all()
        words = np.cumsum(example["words"])
        for word in np.unique(words[places]):
            assert places[(words == word) & ordinary].all()  # all of a word or none of it
        hidden, total = hidden + int(places.sum()), total + int(ordinary.sum())
        masked += int((out["input_ids"][places] == tokenizer.mask_token_id).sum())
        kept += int((out["input_ids"] == example["ids"])[places].sum())
    assert hidden / total == pytest.approx(0.15, abs=0.01)
    assert masked / hidden == pytest.approx(0.8, abs=0.03) and kept / hidden == pytest.approx(0.1, abs=0.03)
    again = [hide(examples[0], np.random.default_rng(seed))["labels"] for seed in (1, 1, 2)]
    assert (again[0] == again[1]).all() and (again[0] != again[2]).any()  # dynamic, by its generator alone


def test_spans_give_the_text_back(data: Path) -> None:
    tokenizer = made(data, "span")
    marks = sentinels(tokenizer)
    example = chunks(tokenizer, [data / "t.jsonl"], 64, "joined", "span")[0]
    out = Hide(Objective("span"), tokenizer)(example, np.random.default_rng(0))
    answer, filled = out["labels"].tolist()[:-1], []
    for token in out["input_ids"].tolist()[:-1]:
        if token in marks:
            begin = answer.index(token) + 1
            end = next((i for i in range(begin, len(answer)) if answer[i] in marks), len(answer))
            filled += answer[begin:end]
        else:
            filled.append(token)
    assert filled == example["ids"].tolist()
    assert sum(t not in marks for t in answer) == round(0.15 * len(example["ids"]))
    batch = Pad(tokenizer.pad_token_id, 7)([out])
    assert batch["decoder_input_ids"][0].tolist() == [7, *out["labels"].tolist()[:-1]]


def test_causal_loss_is_the_models_own(data: Path) -> None:
    tokenizer = made(data, "causal")
    model = build(Model("llama", layers=1, width=16, heads=2, context=32), tokenizer)
    ids = torch.randint(0, len(tokenizer), (3, 20))
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    assert float(next_loss(out, ids)) == pytest.approx(float(out.loss), abs=1e-6)


def test_multiplied_parameters_by_hand(data: Path) -> None:
    tokenizer = made(data, "causal")
    model = build(Model("llama", layers=2, width=16, heads=2, feed_forward=40, context=32), tokenizer)
    assert multiplied(model) == 2 * (4 * 16 * 16 + 3 * 16 * 40 + 2 * 16) + 16 + len(tokenizer) * 16
    gpt = build(Model("gpt2", layers=1, width=16, heads=2, context=32), tokenizer)
    assert sum(p.numel() for p in gpt.parameters()) - multiplied(gpt) == 32 * 16  # the table of positions alone


def recipe(folder: Path, family: str, **changes: Any) -> Path:
    wanted: dict[str, Any] = {
        "text": ["t.jsonl"], "tokenizer": {"name": "bpe", "vocabulary": 400},
        "model": {"family": family, "layers": 1, "width": 32, "heads": 2, "context": 32}, "length": 32, "batch": 8,
        "steps": 12, "optimiser": {"lr": 1e-2}, "log_every": 1, "checkpoint_every": 6} | changes
    path = folder / "r.yaml"
    path.write_text(json.dumps(wanted))  # JSON is YAML
    return path


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_learns_and_loads(family: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    document = train(recipe(tmp_path, family), data, out)
    curve = [point["loss"] for point in document["curve"]]
    assert curve[-1] < curve[0] and document == json.loads((out / "train.json").read_text())
    assert 0 < document["mfu"] < 1 and document["held_out"]["loss"] > 0
    assert document["tokens_per_second"] == pytest.approx(document["tokens"] / document["seconds"])
    assert not (tmp_path / "m.work").exists()
    import transformers

    loaded, report = getattr(transformers, FAMILIES[family][0]).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(out)) >= loaded.config.vocab_size
    assert train(recipe(tmp_path, family), data, out) == document  # finished: nothing is done again
    with pytest.raises(SupremumError, match="another result"):
        train(recipe(tmp_path, family, seed=1), data, out)
    (tmp_path / "other.jsonl").write_text((data / "t.jsonl").read_text() + "\n" + json.dumps({"text": "new"}))
    learnt = [str(data / "t.jsonl"), str(data)]
    assert trained_on(str(out), [*learnt, str(tmp_path / "other.jsonl"), "hub/name"]) == learnt
    assert trained_on("hub/name", learnt) == trained_on(str(data), learnt) == []


def test_text_for_a_t5_of_train_hides_spans_as_its_recipe_did(data: Path, tmp_path: Path) -> None:
    """Each sentinel's span put back where it was gives the text's tokens; the same text is hidden alike."""
    train(recipe(tmp_path, "t5", steps=2), data, tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    encoder = _Encoder.of(checkpoint)
    lines = [json.loads(line)["text"] for line in (data / "t.jsonl").read_text().splitlines()][:5]
    pairs = encoder([{"source": line} for line in [*lines, "a"]])
    assert pairs == encoder([{"source": line} for line in lines]) and len(pairs) == 5  # "a" is one token
    assert len(encoder([{"source": lines[0]}, {"source": "x", "target": "y"}])) == 2  # a given pair stays one
    assert all(len(source) < 64 for source, _ in encoder([{"source": " ".join(lines)}]))  # as long as the recipe's chunks
    with pytest.raises(SupremumError, match="Give pairs"):
        encoder([{"source": "a"}])
    marks = sentinels(encoder.tokenizer)
    for line, (source, target) in zip(lines, pairs, strict=True):
        assert target[0] == encoder.start and source[-1] == target[-1] == encoder.tokenizer.eos_token_id
        spans: dict[int, list[int]] = {}
        for token in target[1:-1]:
            spans.setdefault(token, []) if token in marks else spans[list(spans)[-1]].append(token)
        back = [token for one in source[:-1] for token in (spans[one] if one in marks else [one])]
        assert back == encoder.tokenizer(line, add_special_tokens=False)["input_ids"]
        assert 0.1 < sum(map(len, spans.values())) / len(back) < 0.2


def test_held_out_loss_is_the_stock_models(data: Path, tmp_path: Path) -> None:
    document = train(recipe(tmp_path, "gpt2", held_out=0.2), data, tmp_path / "m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    held = chunks(tokenizer, [data / "t.jsonl"], 32, "joined", "causal").split(0.2)[1]
    with torch.no_grad():
        ids = torch.tensor(np.stack([held[i]["ids"] for i in range(len(held))]))
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(document["held_out"]["loss"], abs=1e-4)


@pytest.fixture(scope="module")
def shards(data: Path) -> Path:
    made(data, "causal").save_pretrained(data / "tokens")
    pack([data / "t.jsonl"], str(data / "tokens"), data / "packed", shard=500, workers=1)  # several shards
    return data / "packed"


def test_packed_windows_are_the_texts_chunks(shards: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokens")
    found = packed_chunks(shards, tokenizer, 32, "causal")
    wanted = chunks(tokenizer, [data / "t.jsonl"], 32, "joined", "causal")
    assert len(found) == len(wanted) > 30 and len(read_index(shards)["shards"]) > 2
    assert all(np.array_equal(found[i]["ids"], wanted[i]["ids"]) for i in range(len(found)))
    kept, held = found.split(0.1)
    assert np.array_equal(held[0]["ids"], wanted[len(kept)]["ids"]) and len(kept) + len(held) == len(found)
    with pytest.raises(IndexError):
        kept[len(kept)]


def test_every_packed_window_comes_once_an_epoch_in_an_order_of_its_number_alone(shards: Path, data: Path) -> None:
    found = packed_chunks(shards, AutoTokenizer.from_pretrained(data / "tokens"), 32, "causal")
    count = len(found)
    drawn = Drawn(found, 3 * count, 7)
    order = [drawn.place(draw) for draw in range(3 * count)]
    assert all(sorted(order[epoch * count:][:count]) == list(range(count)) for epoch in range(3))
    assert order[:count] != list(range(count)) and order[:count] != order[count:2 * count]
    assert [Drawn(found, 3 * count, 7).place(draw) for draw in (count + 5, 2)] == [order[count + 5], order[2]]


def test_training_on_shards_and_going_on_is_training_through(shards: Path, data: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, "gpt2", packed="packed", text=[], tokenizer="bpe", held_out=0.2, checkpoint_every=4)
    whole = train(path, data, tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    held = packed_chunks(shards, AutoTokenizer.from_pretrained(tmp_path / "whole"), 32, "causal").split(0.2)[1]
    with torch.no_grad():
        ids = torch.tensor(np.stack([held[i]["ids"] for i in range(len(held))]))
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(whole["held_out"]["loss"], abs=1e-4)

    def stop(self: Any, arguments: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 6:
            raise KeyboardInterrupt
        return before(self, arguments, state, control, **more)

    with monkeypatch.context() as patch:
        before = watch.Watch.on_step_end
        patch.setattr(watch.Watch, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(path, data, tmp_path / "parts")
    train(path, data, tmp_path / "parts")
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("family", "changes", "says"), [
    ("gpt2", {}, "text: does not go with packed"),
    ("gpt2", {"text": [], "tokenizer": "bpe", "documents": "separate"}, "documents: does not go"),
    ("gpt2", {"text": [], "tokenizer": "words"}, "tokenizer: does not go"),
    ("bert", {"text": [], "tokenizer": "bpe"}, "objective.whole_words"),
    ("gpt2", {"text": [], "tokenizer": "bpe", "packed": "none"}, "no folder of packed tokens"),
])
def test_what_shards_cannot_give_is_refused(family: str, changes: dict[str, Any], says: str, shards: Path, data: Path,
                                            tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match=says):
        train(recipe(tmp_path, family, **{"packed": "packed"} | changes), data, tmp_path / "m")
    assert not (tmp_path / "m.work").exists()


@pytest.mark.parametrize(("changes", "says"), [
    ({"text": ["none.txt"]}, "no such file"), ({"length": 64}, "more than model.context"),
    ({"objective": "masked"}, "does not go with gpt2"), ({"tokenizer": "./none"}, "no tokenizer"),
    ({"model": {"family": "gpt2", "width": 30, "heads": 4}}, "does not divide"),
    ({"model": {"family": "gpt2", "options": {"n_heads": 2}}}, "no setting of gpt2"),
])
def test_refusals(data: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SupremumError, match=says):
        train(recipe(tmp_path, "gpt2", **changes), data, tmp_path / "m")


@pytest.mark.parametrize(("changes", "says"), [
    ({"optimiser": {"name": "sgd", "epsilon": 1e-6}}, "optimiser.epsilon: sgd has none"),
    ({"optimiser": {"name": "adafactor", "betas": [0.8, 0.9]}}, "optimiser.betas: adafactor has none"),
    ({"fsdp": True}, "fsdp: true shards over several processes"),
    pytest.param({"precision": "fp16"}, "fp16 needs a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine without a GPU")),
])
@pytest.mark.parametrize("source", [{"text": ["none.txt"]}, {"text": [], "packed": "none", "tokenizer": "bpe"}])
def test_settings_that_cannot_be_are_refused_before_the_text_is_looked_at(
        source: dict[str, Any], changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """There is no text: whoever read first would say so."""
    with pytest.raises(SupremumError, match=says):
        train(recipe(tmp_path, "gpt2", **source | changes), tmp_path, tmp_path / "m")
    assert not (tmp_path / "m.work").exists()


def launched(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "supremum",
         "train", *arguments], text=True, capture_output=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_one_processs_loss(data: Path, tmp_path: Path, sharded: bool) -> None:
    path = recipe(tmp_path, "gpt2")
    one = train(path, data, tmp_path / "one")
    done = launched(2, str(path), "--data", str(data), "--out", str(tmp_path / "two"), *(["--set", "fsdp=true"] * sharded))
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "train.json").read_text())
    assert two["machine"]["processes"] == 2 and two["tokens"] == one["tokens"]
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)
    assert one["held_out"]["loss"] == pytest.approx(two["held_out"]["loss"], abs=2e-4)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_clearly_and_it_resumes(data: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, "gpt2")
    arguments = [str(path), "--data", str(data), "--out", str(tmp_path / "two")]
    (tmp_path / "killer.py").write_text(
        "import os, signal\nfrom supremum.train import watch\nbefore = watch.Watch.on_step_end\n"
        "def after(self, args, state, control, **kept):\n"
        "    if state.global_step == 8 and os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return before(self, args, state, control, **kept)\n"
        "watch.Watch.on_step_end = after\nfrom supremum.cli import main\nmain()\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "killer.py"),
         "train", *arguments], text=True, capture_output=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and not (tmp_path / "two").exists()
    assert "Another process of this run died" in done.stderr, done.stderr[-3000:]
    again = launched(2, *arguments)
    assert again.returncode == 0 and "goes on from" in again.stderr, again.stderr[-3000:]
    one = train(path, data, tmp_path / "one")
    two = json.loads((tmp_path / "two" / "train.json").read_text())
    assert one["held_out"]["loss"] == pytest.approx(two["held_out"]["loss"], abs=2e-4)
