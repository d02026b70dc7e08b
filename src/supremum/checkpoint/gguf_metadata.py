"""Hyper-parameters of a Transformers config as GGUF keys, by architecture.

Keys and meanings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's loaders. What llama.cpp
fixes in its code (activation, attention scale, norm placement) is compared with the config; a model that differs is
refused, because it would load and answer wrongly. One difference is left to the runtime, as its own converter does:
llama.cpp attends over the whole context where Mistral v0.1, Qwen2 and Phi-3 configure a sliding window, which changes
answers only beyond that window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from ..errors import CheckpointError

ACTIVATIONS = {
    "llama": ("silu",), "qwen2": ("silu",), "qwen3": ("silu",), "phi3": ("silu",),
    "gemma3": ("gelu_pytorch_tanh", "gelu_new"), "gpt2": ("gelu_new", "gelu_pytorch_tanh"),
}  # fmt: skip
GEMMA_PATTERN = 6  # every sixth block attends over everything, the others over a window
GEMMA_LOCAL_THETA = 10_000.0


def _require(truth: bool, config: Any, setting: str, value: Any) -> None:
    if not truth:
        raise CheckpointError(
            f"{config.architectures[0]} with {setting} = {value!r}: llama.cpp cannot run it.",
            "Use --target compressed-tensors.",
        )


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """All keys that llama.cpp's loader of this architecture reads. Raises CheckpointError for what it cannot run."""
    arch = writer.arch
    activation = (
        getattr(config, "hidden_activation", None)
        or getattr(config, "hidden_act", None)
        or getattr(config, "activation_function", None)
    )
    _require(activation in ACTIVATIONS[arch], config, "activation", activation)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        _require(
            config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx,
            config,
            "scale_attn_weights, scale_attn_by_inverse_layer_idx",
            (config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx),
        )
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    rope = rope_parameters(config)
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if arch == "gemma3":
        _add_gemma3(writer, config)
    elif arch == "phi3":
        _require(
            not config.attention_bias if hasattr(config, "attention_bias") else True, config, "attention_bias", True
        )
        writer.add_sliding_window(config.sliding_window or 0)
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    _add_rope_scaling(writer, config, rope)


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary parameters of the blocks with full attention."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention") or parameters)


def _add_gemma3(writer: GGUFWriter, config: Any) -> None:
    """https://github.com/ggml-org/llama.cpp, src/models/gemma3.cpp"""
    expected = [
        "full_attention" if (i + 1) % GEMMA_PATTERN == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    _require(list(config.layer_types) == expected, config, "layer_types", config.layer_types)
    local = (config.rope_parameters.get("sliding_attention") or {}).get("rope_theta", GEMMA_LOCAL_THETA)
    _require(local == GEMMA_LOCAL_THETA, config, "local rope_theta", local)
    size = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else head_size(config)
    _require(config.query_pre_attn_scalar == size, config, "query_pre_attn_scalar", config.query_pre_attn_scalar)
    for setting in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        value = getattr(config, setting, None)
        _require(not value, config, setting, value)
    writer.add_sliding_window(config.sliding_window)


def _add_rope_scaling(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        for setting in ("attention_factor", "mscale", "mscale_all_dim"):
            _require(rope.get(setting) is None, config, f"rope {setting}", rope.get(setting))
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        for setting, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(setting) is not None:
                add(float(rope[setting]))
    elif kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        factor = rope.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(factor))
    elif kind == "llama3":  # llama.cpp reads the tensor alone; the length lets a reader recover the parameters
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    else:
        _require(kind == "default", config, "rope_type", kind)


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Frequency divisors, float32 (D/2,), that llama.cpp reads as tensors.

    Llama 3.1's bands (https://github.com/meta-llama/llama-models): short waves keep their frequency, waves longer than
    the original context are slowed by `factor`, those between are interpolated. LongRoPE (arXiv 2402.13753) lists its
    own.
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope["long_factor"], dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    if kind != "llama3":
        return {}
    size = head_size(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] / waves  # turns within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed, 1: kept
    return {"rope_freqs.weight": (1 / (blend + (1 - blend) / rope["factor"])).float()}
