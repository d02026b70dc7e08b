"""Encoder-decoders from text to file: what is read as pairs, a whole run, the file in stock Transformers, a task's floor."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from supremum import Budget, measure_limits, optimize
from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.floor import Floor, optimize_floor
from supremum.measure import evaluate_texts
from supremum.text.pairs import begin, count, written
from supremum.train.evaluate import evaluate_tuned
from supremum.train.pairs import read_pairs, state_of_pairs
from supremum.train.tune import tune

TinyModel = Callable[..., Path]
WORDS = {"red": "rot", "tree": "baum", "runs": "rennt", "small": "klein", "dog": "hund", "house": "haus"}


def sentences(many: int, seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    said = [draw.choices(list(WORDS), k=draw.randint(2, 9)) for _ in range(many)]
    return [" ".join(words) for words in said], [" ".join(WORDS[word] for word in words) for words in said]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    sources, targets = sentences(400, 0)
    (folder / "a.en").write_text("\n".join(sources) + "\n")
    (folder / "a.de").write_text("\n".join(targets) + "\n")
    (folder / "a.jsonl").write_text("".join(
        json.dumps({"source": one, "target": other}) + "\n" for one, other in zip(sources, targets, strict=True)))
    return folder


def test_rows_and_files_are_the_same_pairs(tiny_model: TinyModel, texts: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("marian"))
    files, rows = f"{texts}/a.en,{texts}/a.de", f"{texts}/a.jsonl"
    one_NT, other_NT = (read_pairs(checkpoint, [source], tokens=2000, seed=0) for source in (files, rows))
    assert torch.equal(one_NT, other_NT) and abs(count(one_NT) - 2000) < 200
    tokenizer, sources, found = checkpoint.tokenizer(), *sentences(400, 0)
    said = dict(zip(sources, found, strict=True))
    for window_T in one_NT:
        source = window_T[:begin(one_NT)]
        start, *target, end = written(window_T).tolist()
        assert start == checkpoint.config.decoder_start_token_id and end == tokenizer.eos_token_id
        assert said[tokenizer.decode(source[source >= 0])] == tokenizer.decode(target)
    assert len({tuple(window_T[:begin(one_NT)].tolist()) for window_T in one_NT}) == len(one_NT)
    assert len(state_of_pairs(checkpoint, [f"{files}[:100]"], None)) == 2
    with pytest.raises(SupremumError, match="tokens are wanted"):
        read_pairs(checkpoint, [files], tokens=10**6, seed=0)


def test_of_plain_text_the_model_writes_the_rest(tiny_model: TinyModel, texts: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("marian"))
    windows_NT = read_pairs(checkpoint, [f"{texts}/a.en"], tokens=400, seed=0)
    model, tokenizer = checkpoint.model(torch.float32), checkpoint.tokenizer()
    for window_T in windows_NT[:3]:
        source = window_T[:begin(windows_NT)]
        said = model.generate(source[source >= 0][None], max_new_tokens=64, do_sample=False, num_beams=1)[0]
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        assert written(window_T)[1:-1].tolist() == tokenizer(text)["input_ids"][:63]


@pytest.fixture(scope="module")
def compressed(tiny_model: TinyModel, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return optimize(tiny_model("marian"), Budget(bits=5), target="compressed-tensors", text=[f"{texts}/a.en,{texts}/a.de"],
                    tokens=2000, dtype="float32", out=tmp_path_factory.mktemp("run") / "out")


def test_a_whole_run_in_stock_transformers(compressed: Any) -> None:
    """Proved on pairs; loaded as the card says it has our logits and writes our words."""
    result = compressed.document["result"]
    assert compressed.document["proof"]["passed"] and 4 < result["bits_per_weight"] <= 5
    assert result["measured"]["kl_mean"] < 0.1
    card = (compressed.folder / "README.md").read_text()
    assert "remove_dispatch" in card and "vllm" not in card
    from compressed_tensors.offload import remove_dispatch

    model = transformers.MarianMTModel.from_pretrained(compressed.folder)
    model.hf_quantizer.compressor.decompress_model(model)
    remove_dispatch(model, onload_tensors=True)
    ours = open_checkpoint(compressed.folder).model(torch.float32)
    pair = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[1, 9, 8]])}
    with torch.no_grad():
        torch.testing.assert_close(model(**pair).logits, ours(**pair).logits)
    words = [one.generate(pair["input_ids"], max_new_tokens=8, do_sample=False) for one in (model, ours)]
    assert torch.equal(*words)


def test_evaluate_measures_the_written_tokens(compressed: Any, tiny_model: TinyModel, texts: Path) -> None:
    """KL against plain Transformers, pair by pair."""
    source = f"{texts}/a.en,{texts}/a.de"
    found = evaluate_texts(compressed.folder, tiny_model("marian"), texts=[source], tokens=600)[0].quality
    checkpoint = open_checkpoint(tiny_model("marian"))
    original, ours = (one.model(torch.float32) for one in (checkpoint, open_checkpoint(compressed.folder)))
    kl = []
    for window_T in (windows_NT := read_pairs(checkpoint, [source], tokens=600, seed=0)):
        read, target = window_T[:begin(windows_NT)], written(window_T)
        with torch.no_grad():
            p, q = (model(input_ids=read[read >= 0][None], decoder_input_ids=target[None, :-1]).logits[0].double()
                    .log_softmax(-1) for model in (original, ours))
        kl.append((p.exp() * (p - q)).sum(-1))
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3) and found.tokens == len(torch.cat(kl))
    with pytest.raises(SupremumError, match="neither disturbed nor explained"):
        evaluate_texts(compressed.folder, tiny_model("marian"), texts=[source], disturb=["typos"])


def test_limits_and_an_archive(tiny_model: TinyModel, texts: Path, tmp_path: Path) -> None:
    """The archive's file is above the limit and is read again to the measured KL."""
    source = [f"{texts}/a.en,{texts}/a.de"]
    made = optimize(tiny_model("marian"), Budget(bits=3), target="archive", text=source, tokens=2000, dtype="float32",
                    out=tmp_path / "archived")
    kl = made.document["result"]["measured"]["kl_mean"]
    assert made.document["proof"]["passed"]
    found = evaluate_texts(made.folder, tiny_model("marian"), texts=source, tokens=2000)[0].quality
    assert found.kl_mean == pytest.approx(kl, rel=0.5)
    curve = measure_limits(tiny_model("marian"), text=source, tokens=2000, dtype="float32").information.curve
    assert 0 < next(limit for bits, limit in curve if bits >= 3) < kl


@pytest.mark.slow
def test_t5_whose_first_blocks_hand_a_bias_on(tiny_model: TinyModel, texts: Path, tmp_path: Path) -> None:
    """Proved in stock Transformers, and read again to the measured KL."""
    source = [f"{texts}/a.en,{texts}/a.de"]
    made = optimize(tiny_model("t5"), Budget(bits=4), target="archive", text=source, tokens=2000, dtype="float32",
                    out=tmp_path / "out")
    assert made.document["proof"]["passed"]
    found = evaluate_texts(made.folder, tiny_model("t5"), texts=source, tokens=2000)[0].quality
    assert 0 < found.kl_mean == pytest.approx(made.document["result"]["measured"]["kl_mean"], rel=0.5)


@pytest.mark.parametrize(("family", "target", "said"), [
    ("umt5", "archive", "a position bias of its own"), ("bart", "gguf", "cannot be written as GGUF"),
    ("t5", "compressed-tensors", "before they are decoded")])
def test_what_cannot_be_is_refused_before_the_work(tiny_model: TinyModel, texts: Path, tmp_path: Path, family: str,
                                                    target: str, said: str) -> None:
    with pytest.raises(SupremumError, match=said):
        optimize(tiny_model(family), Budget(bits=5), target=target, text=[f"{texts}/a.en,{texts}/a.de"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_translator_keeps_its_bleu(tmp_path: Path) -> None:
    """From the recipe to the smallest file: calibrated on the rows that it was tuned on, which are found by tune.json."""
    for name, many in (("train", 800), ("valid", 20), ("test", 20)):
        for side, lines in zip(("en", "de"), sentences(many, len(name) + many), strict=True):
            (tmp_path / f"{name}.{side}").write_text("\n".join(lines) + "\n")
    settings = {"task": {"name": "translate", "length": 32, "new": 14},
                "model": {"family": "marian", "layers": 1, "width": 32, "heads": 2, "context": 32},
                "tokenizer": {"vocabulary": 300}, "batch": 32, "epochs": 12, "optimiser": {"lr": 1e-2},
                "data": {name: f"{name}.en,{name}.de" for name in ("train", "valid", "test")}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    assert tune(tmp_path / "recipe.yaml", tmp_path, tmp_path / "tuned").valid > 0.5
    found = optimize_floor(tmp_path / "tuned", Floor.parse("bleu=0.9x"), Budget(bits=6.5), target="compressed-tensors",
                           tokens=2000, dtype="float32", out=tmp_path / "small")
    floor = found.document["result"]["floor"]
    assert floor["reached"]["valid"]["value"] >= floor["least"]
    assert found.document["text"]["calibration"] == "the rows that it was tuned on"
    assert evaluate_tuned(found.folder, tmp_path / "tuned").rows == 20
