"""One token at a time for many rows at once, fast on a CPU.

What a decode step reads besides the weights is the KV cache. Transformers' dynamic cache copies it at every step, and
its attention repeats it for grouped queries; here it is written in place and read once:

- a layer's keys lie in one buffer (B, H_kv, capacity, D) that grows by GROW positions at a time; the layer hands out
  the filled slice, which every attention implementation understands;
- `grouped_attention` treats the queries that share a key head as one small matrix, and multiplies with the whole
  buffer (batched products of sliced operands are copied first); positions not yet filled are kept out of the softmax.
- with a sliding window the buffer is a ring of that many positions: order does not matter, keys carry their rotation.

B rows, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

GROW = 64  # positions
ATTENTION = "supremum_grouped"


class GrowingLayer(DynamicLayer):
    """One layer's keys and values for steps of one token; at most the last `window` of them if given."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.seen = window, 0
        self.keys = self.values = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.shape[-2] != 1:
            raise ValueError("this cache takes one token at a time")
        self.is_initialized = True
        slot = self.seen if self.window is None else self.seen % self.window
        self.keys, self.values = self._room(self.keys, key_states, slot), self._room(self.values, value_states, slot)
        self.keys[:, :, slot], self.values[:, :, slot] = key_states[:, :, 0], value_states[:, :, 0]
        self.seen += 1
        filled = self.seen if self.window is None else min(self.seen, self.window)
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def _room(self, buffer: Tensor | None, states: Tensor, slot: int) -> Tensor:
        if buffer is not None and slot < buffer.shape[2]:
            return buffer
        rows, heads, _, size = states.shape
        capacity = slot // GROW * GROW + GROW
        larger = states.new_zeros(rows, heads, capacity if self.window is None else min(capacity, self.window), size)
        if buffer is not None:
            larger[:, :, :slot] = buffer
        return larger

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
        filled = self.seen + 1 if self.window is None else min(self.seen + 1, self.window)
        return filled, 0


def decoding_cache(config: Any) -> Cache:
    """An empty cache for `config`'s layers: growing buffers, or Transformers' own for kinds of layers unknown here."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return DynamicCache(config=config)
    return Cache(layers=[GrowingLayer(window if kind == "sliding_attention" else None) for kind in kinds])


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one position of one row takes in all layers."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """Attention of one query per row: query (B, H, 1, D), key and value slices of GrowingLayer's buffers.

    Returns (B, 1, H, D). softmax(q K^T scaling) V, as Transformers' attention interface asks for it.
    """
    rows, heads, _, size = query.shape
    groups, filled = key.shape[1], key.shape[2]
    scaling = size ** -0.5 if scaling is None else scaling
    scores = torch.bmm((query * scaling).reshape(rows * groups, heads // groups, size), _whole(key).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores[..., :filled] += attention_mask[:, :, -1, :filled].expand(rows, groups, filled).reshape(-1, 1, filled)
    scores[..., filled:] = float("-inf")
    out = torch.bmm(torch.softmax(scores, -1), _whole(value))
    return out.view(rows, 1, heads, value.shape[-1]), None


def _whole(part: Tensor) -> Tensor:
    """The contiguous buffer (B H, capacity, D) of which `part` (B, H, filled, D) is the beginning."""
    rows, heads, _, size = part.shape
    capacity = part.stride(1) // size
    return part.as_strided((rows * heads, capacity, size), (capacity * size, size, 1))


AttentionInterface.register(ATTENTION, grouped_attention)


class Decoder:
    """Runs `model` (a causal language model in eval mode) one token at a time for `rows` rows from an empty context."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = decoding_cache(model.config)
        if isinstance(self.cache.layers[0] if self.cache.layers else None, GrowingLayer) and \
                model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(ATTENTION)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B,) int64 and return the next token's logits (B, V)."""
        position = torch.full((1, 1), self.cache.get_seq_length(), device=tokens.device)
        return self.model(input_ids=tokens[:, None], position_ids=position, past_key_values=self.cache,
                          use_cache=True).logits[:, -1]
