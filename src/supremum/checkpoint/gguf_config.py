"""A Transformers config from a GGUF file's metadata.

The inverse of `gguf_metadata.add_hyperparameters`; keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
llama.cpp's "llama" covers Llama and Mistral, which compute the same; they open as Llama. Values are stored in float32:
9.99999974e-06 is read as the 1e-05 that was meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from ..errors import CheckpointError
from .architecture import check_sizes, short_reason
from .gguf_header import GGUFHeader
from .gguf_metadata import rope_tensors

# llama.cpp's architecture: (model_type, class)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
COMMON = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
GATED = {
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def exact(value: Any) -> Any:
    """The shortest decimal that float32 stores as this value."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_config(path: Path, header: GGUFHeader, read: Callable[[str], Tensor]) -> PretrainedConfig:
    """The config; `read` gives a small tensor of the file. Raises CheckpointError for missing and unknown keys."""
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {str(arch)[:60]!r} is not read from GGUF here.",
                              f"Known are {', '.join(ARCHITECTURES)}; else give the original folder.")  # fmt: skip
    keys = _Keys(path, arch, header.metadata)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path}: is one part of a split model.", "Join them with `llama-gguf-split --merge`.")
    if keys.get("expert_count"):
        raise CheckpointError(f"{path}: is a mixture of experts, which is not read from GGUF here.",
                              "Give the Hugging Face folder.")  # fmt: skip
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path}: has no tensor token_embd.weight.", "The file is incomplete; download it again.")
    model_type, cls = ARCHITECTURES[arch]
    settings: dict[str, Any] = {hf: keys.need(name) for name, hf in COMMON.items()}
    settings |= {hf: header.metadata.get(f"tokenizer.ggml.{name}") for name, hf in TOKENS.items()}
    settings |= {
        "architectures": [cls],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if arch == "gpt2":
        settings |= {"layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
                     "n_inner": keys.need("feed_forward_length")}  # fmt: skip
    else:
        settings |= _rotary_model(keys, header, settings, read)
    check_sizes(settings, path, len(header.tensors))
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # config classes validate with their own exceptions
        raise CheckpointError(f"{path}: its metadata make no valid config ({short_reason(error)}).",
                              "Convert the model again with a current llama.cpp.") from error  # fmt: skip
    _check_rope(path, header, config, read)
    return config


class _Keys:
    """The architecture's own keys of the metadata."""

    def __init__(self, path: Path, arch: str, metadata: Mapping[str, Any]) -> None:
        self.path, self.arch, self.metadata = path, arch, metadata

    def get(self, name: str, default: Any = None) -> Any:
        """A positive number, or `default` when the file does not have the key (or has 0, which means the same)."""
        value = self.metadata.get(f"{self.arch}.{name}")
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise CheckpointError(f"{self.path}: {self.arch}.{name} differs from layer to layer.",
                                      "Give the model's Hugging Face folder.")  # fmt: skip
            value = value[0]
        if value is None or value == 0:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.refuse(name, value)
        return exact(value)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self.refuse(name, self.metadata.get(f"{self.arch}.{name}"))
        return value

    def refuse(self, name: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.arch}.{name} is {str(value)[:40]}.",
                               "Convert the model again with a current llama.cpp.")  # fmt: skip


def _rotary_model(keys: _Keys, header: GGUFHeader, settings: dict[str, Any],
                  read: Callable[[str], Tensor]) -> dict[str, Any]:  # fmt: skip
    """Settings of the gated decoders with rotary positions: all but GPT-2."""
    heads = settings["num_attention_heads"]
    found: dict[str, Any] = {hf: keys.need(name) for name, hf in GATED.items()}
    found["num_key_value_heads"] = keys.get("attention.head_count_kv", heads)
    width = keys.get("rope.dimension_count")
    size = keys.get("attention.key_length")
    if size is None:
        size = width if keys.arch == "llama" and width else settings["hidden_size"] // heads
    if size < 1:
        raise keys.refuse("attention.head_count", heads)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base", 10000.0))}
    if keys.arch == "phi3":
        rope["partial_rotary_factor"] = (width or size) / size
        found["sliding_window"] = keys.get("attention.sliding_window")
    else:
        found["head_dim"] = size
    if keys.arch == "llama":
        found["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        found["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    rope |= _scaling(keys, header, read)
    if keys.arch == "gemma3":
        # 27B has another scale, which the file does not hold (llama.cpp, src/models/gemma3.cpp)
        scalar = settings["hidden_size"] // heads if settings["num_hidden_layers"] == 62 else size
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return found | {"rope_parameters": {"full_attention": rope, "sliding_attention": local},
                        "query_pre_attn_scalar": scalar,
                        "sliding_window": keys.need("attention.sliding_window")}  # fmt: skip
    if keys.arch == "phi3":
        found["original_max_position_embeddings"] = int(
            keys.get("rope.scaling.original_context_length") or settings["max_position_embeddings"])  # fmt: skip
    return found | {"rope_parameters": rope}


def _scaling(keys: _Keys, header: GGUFHeader, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """Stretched rotary positions: named in the metadata (linear, yarn) or given as tensors (llama3, longrope)."""
    kind = keys.metadata.get(f"{keys.arch}.rope.scaling.type", "none")
    original = keys.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in header.tensors:  # Llama 3.1 and later: the published bands, checked below
        factor = float(read("rope_freqs.weight").max())
        return {"rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": int(original or 8192)}  # fmt: skip
    if "rope_factors_long.weight" in header.tensors and "rope_factors_short.weight" in header.tensors:
        scaled: dict[str, Any] = {f"{length}_factor": [exact(v) for v in read(f"rope_factors_{length}.weight").tolist()]
                                  for length in ("long", "short")}  # fmt: skip
        if (attention := keys.get("rope.scaling.attn_factor")) is not None:
            scaled["attention_factor"] = attention
        return scaled | {"rope_type": "longrope", "original_max_position_embeddings": int(original or 4096)}
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.need("rope.scaling.factor")}
    if kind == "yarn":
        found = {"rope_type": "yarn", "factor": keys.need("rope.scaling.factor")}
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := keys.get(f"rope.scaling.{theirs}")) is not None:
                found[ours] = value
        return found | ({"original_max_position_embeddings": int(original)} if original else {})
    if kind != "none":
        raise CheckpointError(f"{keys.path}: rope scaling {str(kind)[:40]!r} is unknown.", "Give the original folder.")
    return {}


def _check_rope(path: Path, header: GGUFHeader, config: PretrainedConfig, read: Callable[[str], Tensor]) -> None:
    """The rotary factors that this config would write must be those in the file."""
    if "rope_freqs.weight" not in header.tensors:
        return
    stored, ours = read("rope_freqs.weight").float(), rope_tensors(config)["rope_freqs.weight"]
    if stored.shape != ours.shape or not torch.allclose(stored, ours, rtol=1e-3):
        raise CheckpointError(f"{path}: its rope_freqs.weight is not that of a Llama 3 rotary scaling.",
                              "Give the Hugging Face folder, whose config.json holds the parameters.")  # fmt: skip
