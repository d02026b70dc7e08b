"""Ceilings against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

from supremum.limits import roofline
from supremum.limits.hardware import Machine, Peak, Read
from supremum.limits.roofline import Format
from supremum.limits.topology import Cache

MACHINE = Machine(
    "cpu", "test", 1, 10**9, (Cache(2, 10**6, 1, "measured"),),
    (Read("memory", 10**7, 1, 9.0, 10.0),), (Peak("float32", 1, 90.0, 100.0),),
)  # fmt: skip
HALF = Format("half", 16.0, ("float32",))


def build(config: object, cls: object = None) -> torch.nn.Module:
    with torch.device("meta"):
        return cls(config) if cls else AutoModelForCausalLM.from_config(config)  # type: ignore[operator]


def llama() -> roofline.Workload:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return roofline.workload(config, build(config))


def test_llama_decode_ceiling_by_hand():
    work = llama()
    blocks = 3 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 160 * 64)
    head = 100 * 64
    assert work.block_weights == blocks and work.head_weights == head and work.tied
    assert work.weights_stored == blocks + head
    kv = 3 * 2 * 2 * 16 * 2  # layers, k and v, heads, head size, two bytes
    assert work.kv_bytes(50) == 50 * kv
    ceiling = roofline.decode(work, MACHINE, HALF, context=50, batch=4)
    nbytes = (blocks + head) * 2 + 4 * 50 * kv
    operations = 2 * (blocks + head) * 4 + 4 * 4 * 3 * 4 * 16 * 50
    assert (ceiling.nbytes, ceiling.operations) == (nbytes, operations)
    assert ceiling.limited_by == "memory"
    assert ceiling.tokens_per_s == pytest.approx(4 / (nbytes / 10e9))


def test_llama_prefill_ceiling_by_hand():
    work = llama()
    ceiling = roofline.prefill(work, MACHINE, HALF, context=1000)
    operations = 2 * (work.block_weights * 1000 + work.head_weights) + 2 * 3 * 64 * 1000**2
    assert ceiling.operations == operations and ceiling.limited_by == "arithmetic"
    assert ceiling.seconds == pytest.approx(operations / 100e9)
    assert ceiling.tokens_per_s == pytest.approx(1000 / ceiling.seconds)


def test_sliding_windows_bound_the_cache_and_the_attention():
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, vocab_size=50, sliding_window=10,
    )  # fmt: skip
    work = roofline.workload(config, build(config))
    assert work.windows == (10, 10, 10, 10, 10, None)
    assert work.kv_bytes(100) == (5 * 10 + 100) * 2 * 32 * 2
    long = roofline.prefill(work, MACHINE, HALF, context=100).operations
    pairs = 5 * sum(min(t, 10) for t in range(1, 101)) + sum(range(1, 101))
    exact = 2 * (work.block_weights * 100 + work.head_weights) + 4 * 4 * 32 * pairs
    assert long == pytest.approx(exact, rel=0.01)


def test_families_are_counted_from_their_module_tree():
    gpt = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=64)
    work = roofline.workload(gpt, build(gpt))
    assert work.block_weights == 2 * 12 * 32 * 32 and work.table_weights == (40 + 64) * 32
    assert work.kv_heads == 2 and work.intermediate == 128 and work.weights_stored == work.block_weights + 104 * 32

    albert = AlbertConfig(
        hidden_size=32, embedding_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=9
    )
    work = roofline.workload(albert, build(albert, AlbertModel))
    layer = 4 * 32 * 32 + 2 * 32 * 64
    assert work.block_weights == layer + 8 * 32 and work.weights_used == 4 * layer + 8 * 32
    assert not work.causal and work.kv_bytes(10) == 0

    bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=11)
    work = roofline.workload(bert, build(bert, BertForMaskedLM))
    ceiling = roofline.prefill(work, MACHINE, HALF, context=20, batch=3)
    assert ceiling.operations == 3 * (2 * 20 * (work.block_weights + 11 * 32) + 4 * 2 * 32 * 20 * 20)


def test_experts_are_read_as_often_as_tokens_meet_them():
    config = Qwen3MoeConfig(
        num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, hidden_size=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=20, intermediate_size=16,
    )  # fmt: skip
    work = roofline.workload(config, build(config))
    assert work.experts == 8 and work.expert_weights == 2 * 8 * 3 * 16 * 32
    dense = work.block_weights + work.head_weights
    assert work.weights_read(1) == dense + work.expert_weights / 4
    assert work.weights_read(2) == dense + work.expert_weights * (1 - 0.75**2)
    assert work.weights_used == work.block_weights + work.expert_weights / 4


def test_capacity_finds_the_longest_context():
    work = llama()
    roomy = roofline.capacity(work, MACHINE, HALF, context=100)
    assert roomy.fits and roomy.longest_context == 4096 and roomy.lives_in == "L2"
    need = roomy.weight_bytes + work.kv_bytes(2000) + 4 * (512 * (6 * 64 + 2 * 160) + 100)
    tight = Machine("cpu", "test", 1, int(need), MACHINE.caches, MACHINE.reads, MACHINE.peaks)
    assert roofline.capacity(work, tight, HALF, context=4096).longest_context == 2000
    none = Machine("cpu", "test", 1, 1000, MACHINE.caches, MACHINE.reads, MACHINE.peaks)
    assert roofline.capacity(work, none, HALF, context=1).longest_context == 0


def test_formats_carry_their_scales():
    bits = {form.name: form.bits for form in roofline.formats(("BF16", "Q8_0", "Q4_0", "Q2_K"))}
    assert bits == {"BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5, "Q2_K": 2.625}


def test_the_grid_is_cut_at_the_model_s_own_context():
    limit = roofline.hardware_limit(llama(), MACHINE, contexts=(128, 10**6), batches=(1,))
    assert {c.context for c in limit.ceilings} == {128, 4096}
    assert {c.phase for c in limit.ceilings} == {"decode", "prefill"}
    faster = [c.tokens_per_s for c in limit.ceilings if c.phase == "decode" and c.context == 128]
    assert faster == sorted(faster)
