"""GGUF files for the tests, made as llama.cpp's convert_hf_to_gguf.py makes them and independently of our writer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

Q = gguf.GGMLQuantizationType


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def convert(folder: Path, path: Path, kind: Q = Q.F32) -> Path:
    """A tiny decoder's folder as a GGUF file; matrices of the blocks as `kind`, the rest float32."""
    config = json.loads((folder / "config.json").read_text())
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    if arch == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config["n_inner"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        size = config.get("head_dim") or config["hidden_size"] // heads
        rope = config.get("rope_parameters") or {}
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base((rope.get("full_attention") or rope).get("rope_theta", 10000.0))
        if arch in ("qwen3", "gemma3"):
            writer.add_key_length(size)
            writer.add_value_length(size)
        if arch == "gemma3":
            writer.add_sliding_window(config["sliding_window"])
    vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()))
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = tensor.float().numpy()
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if arch == "llama" and "q_proj" in name:
            value = permuted(value, heads)
        elif arch == "llama" and "k_proj" in name:
            value = permuted(value, config["num_key_value_heads"])
        elif arch == "gemma3" and "norm" in name:
            value = value + 1
        elif arch == "gpt2" and value.ndim == 2 and ".h." in name:
            value = value.T
        if value.ndim == 2 and stored.startswith("blk.") and kind != Q.F32:
            writer.add_tensor(stored, gguf.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(writer: gguf.GGUFWriter, spec: dict[str, Any]) -> None:
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    special = {t["content"] for t in spec["added_tokens"] if t["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in spec["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, code: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", code) + value


def tensor(name: str, dims: tuple[int, ...] = (32,), code: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def raw(*, magic: bytes = b"GGUF", version: int = 3, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (),
        n_pairs: int | None = None, n_tensors: int | None = None, data: bytes = bytes(128),
        alignment: int = 32) -> bytes:  # fmt: skip
    """A file from its pieces; the counts can lie."""
    head = magic + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                               len(pairs) if n_pairs is None else n_pairs)  # fmt: skip
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def random_blocks(kind: Q, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random bytes shaped as `rows` of that block format, uint8 (rows, bytes of a row)."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return torch.randint(0, 256, (rows, columns // block * size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
