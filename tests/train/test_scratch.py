"""Models from scratch and the encoder-decoder road: its loss and its padding against single rows, and a code learnt whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from supremum.errors import SupremumError
from supremum.train.base import scratch
from supremum.train.corpus import TokenizerRecipe
from supremum.train.models import Model
from supremum.train.tasks import make
from supremum.train.tune import tune
from tests.conftest import tiny_tokenizer

WORDS = {"red": "rot", "tree": "baum", "runs": "rennt", "small": "klein", "dog": "hund", "house": "haus"}


def bart() -> Any:
    """A random encoder-decoder whose places are absolute: what stands before a text would move it."""
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=384, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.3, pad_token_id=1, eos_token_id=1,
        bos_token_id=0, decoder_start_token_id=1, forced_eos_token_id=None)).eval()


def rows(many: int, seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    said = [draw.choices(list(WORDS), k=draw.randint(4, 6)) for _ in range(many)]
    return [" ".join(words) for words in said], [" ".join(WORDS[word] for word in words) for words in said]


def recipe(folder: Path, **more: Any) -> Path:
    for name, many in (("train", 400), ("valid", 4), ("test", 20)):
        for side, lines in zip(("en", "de"), rows(many, len(name) + many), strict=True):
            (folder / f"{name}.{side}").write_text("\n".join(lines) + "\n")
    settings = {"task": {"name": "translate", "length": 32, "new": 12, "smoothing": 0.1, "beams": 2},
                "model": {"family": "marian", "layers": 1, "width": 32, "heads": 2, "context": 32},
                "tokenizer": {"vocabulary": 300},
                "data": {name: f"{name}.en,{name}.de" for name in ("train", "valid", "test")}, "batch": 32,
                "epochs": 24, "optimiser": {"lr": 1e-2}} | more
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("encoder", [True, False])
def test_label_smoothing_against_its_sum_written_out(encoder: bool, tiny_model: Callable[..., Path]) -> None:
    """(1 - e) x -log p(target) + e x mean over tokens of -log p, one row after another without padding."""
    model = bart() if encoder else transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    task, tokenizer = make("translate", {"length": 48, "new": 16, "smoothing": 0.3}, "r.yaml"), tiny_tokenizer()
    tokenizer.chat_template, task.encoder = None, encoder  # type: ignore[attr-defined]
    said = [{"where": "", "source": "the river", "target": "a stone"}, {"where": "", "source": "a", "target": "b c d"}]
    features, total, count = task.encode(said, tokenizer), 0.0, 0
    with torch.no_grad():
        for row, feature in zip(said, features, strict=True):
            target = [*tokenizer(row["target"])["input_ids"], tokenizer.eos_token_id]
            if encoder:
                read, written = feature["input_ids"], [1, *target[:-1]]
                log_TV = model(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([written])).logits[0]
            else:
                log_TV = model(torch.tensor([feature["input_ids"]])).logits[0, -len(target) - 1 : -1]
            for log_V, token in zip(log_TV.log_softmax(-1), target, strict=True):
                total, count = total - 0.7 * float(log_V[token]) - 0.3 * float(log_V.mean()), count + 1
        loss = float(task.loss(model, task.collate(tokenizer)(features)))
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_reads_rows_of_unlike_length_as_if_alone(beams: int) -> None:
    task, tokenizer, model = make("translate", {"length": 48, "new": 8, "beams": beams}, "r.yaml"), tiny_tokenizer(), bart()
    task.encoder = True  # type: ignore[attr-defined]
    said = [{"where": "", "source": "the river moves a stone " * n, "target": "x"} for n in (1, 3, 2)]
    assert task.predict(model, tokenizer, said, 3) == [task.predict(model, tokenizer, [row], 1)[0] for row in said]


def test_a_word_for_word_code_is_learnt_from_scratch_and_scores_alike_when_opened_again(tmp_path: Path) -> None:
    done = tune(recipe(tmp_path), tmp_path, tmp_path / "out")
    ours, copy = done.lines
    assert copy.metric.value < 1 and ours.metric.value > 90 and not done.beaten
    assert done.model == "marian from scratch" and done.trained == done.parameters - 2 * 32 * 32  # fixed tables of places
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    out = model.generate(**tokenizer("small red dog runs", return_tensors="pt"), max_new_tokens=12, num_beams=2)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == "klein rot hund rennt"
    again = tune(tmp_path / "recipe.yaml", tmp_path, tmp_path / "again", changes=[f"model={tmp_path / 'out'}", "epochs=0"])
    assert again.lines[0].metric == ours.metric and again.trained == 0


def test_other_tasks_start_from_scratch_too(tmp_path: Path) -> None:
    lines = [f"{'good' if n % 2 else 'bad'} {n % 7}\t{n % 2}" for n in range(64)]
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    path = recipe(tmp_path, task="classify", model={"family": "bert", "layers": 1, "width": 32, "heads": 2, "context": 16},
                  tokenizer={"name": "wordpiece", "vocabulary": 260}, epochs=8, batch=16,
                  data={name: f"{name}.tsv" for name in ("train", "valid", "test")}
                  | {"columns": {"text": 0, "label": 1}})
    assert tune(path, tmp_path, tmp_path / "out").lines[0].metric.value == 1.0


def test_the_tokenizer_is_a_function_of_the_rows() -> None:
    sources, targets = rows(50, 0)
    said = [{"source": source, "target": target} for source, target in zip(sources, targets, strict=True)]
    made = [scratch(Model("marian", 1, 16, 2), TokenizerRecipe("bpe", 280), make("translate", {}, ""), part, 0)
            for part in (said, said, said[:9])]
    assert made[0][2] == made[1][2] != made[2][2]
    assert made[0][1]("dog")["input_ids"][-1] == made[0][0].config.eos_token_id
    assert all(map(torch.equal, made[0][0].parameters(), made[1][0].parameters()))


@pytest.mark.parametrize("changes, said", [
    (["model.family=bert"], "bert reads and does not write; translate writes"),
    (["way=lora"], "from scratch"), (["model.heads=3"], "width of 32 does not divide into 3 heads"),
    (["model.familiy=t5"], "Did you mean model.family"), (["task.smoothing=1"], "at most 0.9"),
    (["task.beams=0"], "at least 1"), (["tokenizer=none-such"], "no tokenizer that can be loaded"),
    (["tokenizer.vocabulary=100"], "at least 260"),
])
def test_what_cannot_be_built_is_refused(changes: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match=said):
        tune(recipe(tmp_path), tmp_path, tmp_path / "out", changes=changes)
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_needs_pairs(tmp_path: Path) -> None:
    """One that was not tuned here says by itself neither what it reads nor what it writes."""
    from supremum import Budget, measure_limits, optimize
    from supremum.checkpoint.targets import names
    from supremum.measure import evaluate_cache_files, evaluate_texts

    bart().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SupremumError, match="which, is not known"):
        evaluate_texts(tmp_path, tokens=64, length=16)
    with pytest.raises(SupremumError, match="which, is not known"):
        measure_limits(tmp_path)
    for target in names("optimize"):
        with pytest.raises(SupremumError, match="which, is not known"):
            optimize(tmp_path, Budget(bits=4), target=target, out=tmp_path / "out")
    with pytest.raises(SupremumError, match="reads one text and writes another"):
        evaluate_cache_files(tmp_path, None, ("q8_0", "q8_0"), text=None, tokens=64, length=16, seed=0)
    assert not (tmp_path / "out.work").exists()
