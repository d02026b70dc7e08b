"""A model run block by block gives what the whole model gives, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supremum.checkpoint import open_checkpoint
from supremum.measure.streamed import final_hidden, replacing
from supremum.stats.streaming import BlockStream, linears, orientation
from supremum.stats.sweep import run_block
from tests.conftest import DECODERS, ENCODERS, FAMILIES

TinyModel = Callable[..., Path]
HEADLESS = {"bert": "BertModel", "distilbert": "DistilBertModel", "roberta": "RobertaModel", "albert": "AlbertModel"}
LENGTH = 100  # beyond Gemma's sliding window of 64


def windows(count: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random tokens; also the padding token, which RoBERTa's positions depend on."""
    return torch.randint(0, 384, (count, length), generator=torch.Generator().manual_seed(seed))


def answers(stream: BlockStream, windows_NT: Tensor) -> Tensor:
    hidden_NTd = final_hidden(stream, windows_NT)
    with stream.head() as head, torch.no_grad():
        return head(hidden_NTd)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models(tiny_model: TinyModel, family: str) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    with torch.no_grad():
        whole_NTV = checkpoint.model(torch.float32)(input_ids=windows()).logits
    torch.testing.assert_close(answers(BlockStream(checkpoint, dtype=torch.float32), windows()), whole_NTV,
                               atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_features_of_headless_encoders(tiny_model: TinyModel, family: str) -> None:
    checkpoint = open_checkpoint(tiny_model(family, architecture=HEADLESS[family]))
    stream = BlockStream(checkpoint, dtype=torch.float32)
    assert stream.table_names()[1] is None
    with torch.no_grad():
        whole_NTd = checkpoint.model(torch.float32)(input_ids=windows()).last_hidden_state
    torch.testing.assert_close(answers(stream, windows()), whole_NTd, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "albert", "llama", "bert"])
def test_replaced_weights_are_used_everywhere(tiny_model: TinyModel, family: str) -> None:
    """Every matrix that can be compressed, tied tables included, in (O, I) orientation."""
    checkpoint = open_checkpoint(tiny_model(family))
    stream, model = BlockStream(checkpoint, dtype=torch.float32), checkpoint.model(torch.float32)
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (shape, turned) in orientation(stream).items():
            weights[name] = torch.randn(shape, generator=generator) * 0.1
            parameters[name].copy_(weights[name].T if turned else weights[name])
        whole_NTV = model(input_ids=windows()).logits
    before_NTV = answers(stream, windows())
    with replacing(stream, weights.get):
        torch.testing.assert_close(answers(stream, windows()), whole_NTV, atol=2e-5, rtol=1e-4)
    assert torch.equal(answers(stream, windows()), before_NTV)  # nothing of it stays


@pytest.mark.parametrize("family", FAMILIES)
def test_orientation_is_that_of_the_equation(tiny_model: TinyModel, family: str) -> None:
    """W (out, in): the input that reaches a layer has `in` features, what leaves it `out`."""
    stream = BlockStream(open_checkpoint(tiny_model(family)), dtype=torch.float32)
    shapes = orientation(stream)
    seen: dict[str, tuple[int, int]] = {}
    call = stream.calls(windows(1))[0]
    with stream.block(call.block) as block:
        for name, layer in linears(block).items():
            layer.register_forward_hook(lambda m, args, out, name=name: seen.update(
                {name: (out.shape[-1], args[0].shape[-1])}))
        run_block(block, call, stream.embed(windows(1)))
    assert {name: shapes[f"{call.block}.{name}.weight"][0] for name in seen} == seen
    assert set(stream.table_names()) - {None} <= set(shapes)


def test_only_one_block_is_in_memory(tiny_model: TinyModel) -> None:
    stream = BlockStream(open_checkpoint(tiny_model("llama")), dtype=torch.float32)
    first, second = stream.blocks
    with stream.block(first) as block:
        assert not any(p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in stream.blocks[second].parameters())
    answers(stream, windows())
    assert all(p.is_meta for p in stream.model.parameters())
    assert all(p.is_meta for block in stream.blocks.values() for p in block.parameters())


@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_has_the_same_hidden_states(tiny_model: TinyModel, family: str) -> None:
    """What the backward sweep relies on when it uses the beginning of each window."""
    stream = BlockStream(open_checkpoint(tiny_model(family)), dtype=torch.float32)
    torch.testing.assert_close(final_hidden(stream, windows())[:, :80], final_hidden(stream, windows()[:, :80]),
                               atol=2e-5, rtol=1e-4)
