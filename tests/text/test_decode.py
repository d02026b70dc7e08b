"""Decoding step by step gives the logits of one pass over the whole row, for every family of decoders."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from supremum.text import decode
from supremum.text.decode import Decoder, GrowingLayer, cache_bytes

CASES = {
    "llama": {}, "llama-mha": {"num_key_value_heads": 4}, "qwen2": {}, "qwen3": {}, "gpt2": {}, "phi3": {},
    "mistral": {},
    "mistral-sliding": {"sliding_window": 7}, "phi3-sliding": {"sliding_window": 9},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 6,
                      "layer_types": ["full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_steps_equal_one_pass(case, tiny_model, monkeypatch):
    monkeypatch.setattr(decode, "GROW", 8)  # several growths within the row
    folder = tiny_model(case.split("-")[0], **CASES[case])
    tokens = torch.randint(2, 384, (3, 30), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert decoder.model.config._attn_implementation == decode.ATTENTION
    assert all(isinstance(layer, GrowingLayer) for layer in decoder.cache.layers)
    got = torch.stack([decoder.step(column) for column in tokens.T], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    held = sum(tensor.numel() * 4 for layer in decoder.cache.layers for tensor in (layer.keys, layer.values))
    assert "sliding" in case or case == "gemma3" or held == cache_bytes(decoder.model.config, torch.float32) * 3 * 32


@torch.inference_mode()
def test_the_cache_serves_other_attention_too(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager").eval()
    tokens = torch.randint(2, 384, (2, 20), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model)
    assert model.config._attn_implementation == "eager"
    got = torch.stack([decoder.step(column) for column in tokens.T], 1)
    torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_of_single_steps_refuses_more():
    with pytest.raises(ValueError, match="one token at a time"):
        GrowingLayer().update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
