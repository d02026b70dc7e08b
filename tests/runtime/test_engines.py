"""The engines themselves, loaded in this process."""

from __future__ import annotations

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import target
from supremum.errors import SupremumError
from supremum.runtime import capabilities, load

TITLES = ("llama.cpp", "Transformers")
PROMPT = [5, 9, 200, 31, 77, 120]


@pytest.fixture(params=["gguf", "compressed-tensors"])
def engine(request, tiny_model, tmp_path):
    made = target(request.param)
    checkpoint = open_checkpoint(tiny_model("qwen3", "float32"))
    runtime = load(made.runtime, made.write(checkpoint, {}, tmp_path), context=256)
    assert capabilities(made.runtime) == runtime.capabilities and runtime.capabilities.title in TITLES
    yield runtime, checkpoint
    runtime.close()


@torch.inference_mode()
def test_logprobs(engine):
    runtime, checkpoint = engine
    model = checkpoint.model(torch.float32)
    log_p_TV = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for length, (ids, values) in zip([2, 6], runtime.logprobs(PROMPT, [2, 6], 384), strict=True):
        assert sorted(ids) == list(range(384)) and values == sorted(values, reverse=True)
        torch.testing.assert_close(torch.tensor(values), log_p_TV[length - 1][torch.tensor(ids)], rtol=0, atol=0.02)


def test_speed_and_tokens(engine):
    runtime, checkpoint = engine
    speed = runtime.speed(PROMPT * 10, 8)
    assert speed.prefill > speed.decode > 0
    text = "The river carries the letter."
    assert runtime.tokenize(text) == checkpoint.tokenizer()(text).input_ids


def test_refusals(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SupremumError, match="cannot load"):
        load("llama_cpp", tmp_path / "x.gguf")
    with pytest.raises(SupremumError, match="cannot load"):
        load("transformers", tmp_path)
