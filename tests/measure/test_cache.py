"""A quantised cache of keys and values, measured in llama.cpp: coarser types cost more, the exact one nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import target
from supremum.errors import SupremumError
from supremum.measure import cache_types, evaluate_cache
from supremum.measure.cache import cache_bytes

LLAMA = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, head_dim=None, num_hidden_layers=32)


def test_types():
    assert cache_types("q8_0") == ("q8_0", "q8_0") and cache_types("Q8_0,q4_0") == ("q8_0", "q4_0")
    for wrong in ("q3_k", "q8_0,q8_0,q8_0", "", "q8_0,"):
        with pytest.raises(SupremumError, match="not a type of cache"):
            cache_types(wrong)


def test_bytes():
    """Llama 3 8B: 128 KiB a token in float16; 34 bytes hold 32 numbers in q8_0, 18 in q4_0."""
    assert cache_bytes(LLAMA, ("f16", "f16"), 1024) == 128 * 1024 * 1024
    assert cache_bytes(LLAMA, ("q8_0", "q4_0"), 1024) == 32 * 8 * 128 * 1024 * (34 + 18) // 32
    with pytest.raises(SupremumError, match="a head of this model has 16"):
        cache_bytes(SimpleNamespace(**vars(LLAMA) | {"head_dim": 16}), ("f16", "q8_0"), 8)


def test_coarser_types_cost_more(tiny_model, tmp_path):
    original = open_checkpoint(tiny_model("qwen3", "bfloat16"))
    file = open_checkpoint(target("gguf").write(original, {}, tmp_path))
    windows = torch.randint(384, (2, 64), generator=torch.Generator().manual_seed(0))
    eight, four = (evaluate_cache(file, original, windows, types, threads=1)
                   for types in (("q8_0", "q8_0"), ("q4_0", "q4_0")))
    assert 0 < eight.kl_mean < four.kl_mean / 10 and eight.perplexity_exact == four.perplexity_exact != four.perplexity
    assert eight.kl_reference_exact == four.kl_reference_exact < 1e-3  # of llama.cpp's own arithmetic
    assert four.kl_reference == pytest.approx(four.kl_mean, rel=0.2)
    assert (four.positions, four.windows, four.context) == (16, 2, 64) and four.kl_se is not None
    assert four.bytes_exact > eight.bytes > four.bytes


def test_only_llama_cpp_has_it(tiny_model):
    with pytest.raises(SupremumError, match=r"\.gguf"):
        evaluate_cache(open_checkpoint(tiny_model("qwen3")), None, torch.zeros(1, 32, dtype=torch.int64), ("q8_0", "q8_0"))
