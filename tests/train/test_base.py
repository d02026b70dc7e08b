"""What a task starts from, and which of its layers an adapter is put on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.train.base import load
from supremum.train.tasks import make
from supremum.train.ways import Way, blocks, merged, prepare

TASK = {"length": 32}


@pytest.mark.parametrize("labels", [1, 3])
def test_a_base_with_other_labels_gives_its_trunk_and_not_its_head(labels: int, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("bert", architecture="BertForSequenceClassification", num_labels=labels)
    task = make("classify", TASK, "here")
    task.labels = ["x", "y"]
    one, other = (load(str(folder), task, seed)[0] for seed in (0, 1))
    stored = open_checkpoint(folder)
    assert one.classifier.weight.shape == (2, 64) and not torch.equal(one.classifier.weight, other.classifier.weight)
    assert all(torch.equal(value, stored.read(name)) for name, value in one.bert.named_parameters(prefix="bert"))


def test_a_trunk_that_is_the_whole_model_takes_a_new_head(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("t5")
    model, *_ = load(str(folder), make("answer", {"length": 64, "stride": 8}, "here"), 0)
    stored = open_checkpoint(folder)
    assert model.qa_outputs.weight.shape == (2, stored.config.d_model)
    assert torch.equal(model.shared.weight, stored.read("shared.weight"))


@pytest.mark.parametrize("family", ["marian", "bart", "t5"])
def test_an_encoder_decoder_is_adapted_in_both(family: str, tiny_model: Callable[..., Path]) -> None:
    model, *_ = load(str(tiny_model(family)), make("translate", TASK, "here"), 0)
    assert len(blocks(model)) == 4
    adapted, _ = prepare(model, Way("lora", rank=2), 10)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    for stack, layers in (("encoder", 6), ("decoder", 10)):  # of each of two blocks
        assert sum(f".{stack}." in name for name in names) == 2 * layers


@pytest.mark.parametrize("way", ["lora", "adalora", "ia3"])
def test_gpt2s_transposed_layers_are_adapted_too(way: str, tiny_model: Callable[..., Path]) -> None:
    model, *_ = load(str(tiny_model("gpt2")), make("instruct", TASK, "here"), 0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapted, _ = prepare(model, Way(way, rank=2), 10)  # type: ignore[arg-type]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    ids = torch.arange(2, 18)[None]
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        plain = merged(adapted)
        assert torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-4)
    moved = {name for name, value in plain.named_parameters() if not torch.equal(value, before[name])}
    assert {f"transformer.h.{n}.{layer}.weight" for n in (0, 1) for layer in ("attn.c_attn", "mlp.c_proj")} <= moved
    assert not any("wte" in name or "ln" in name for name in moved)
