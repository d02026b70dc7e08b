"""A cache of 8, 4 or 2 bits in Transformers: keys by channel, values by token, the last exact (KIVI, arXiv 2402.02750).

    x^ = m + s q,   m = min x,  s = (max x - min x) / (2^b - 1),  q = round((x - m) / s)        m and s in float16

A key's channel shares m and s over GROUP tokens, a value's token over GROUP channels. Tokens older than the last RESIDUAL are
coded, GROUP at a time and once; Transformers' own quantised layers code everything anew at each flush, one way for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import SupremumError
from ..progress import phase
from .scores import compare, summarise

GROUP, RESIDUAL, CHUNK = 32, 32, 32  # tokens, or channels; CHUNK: read at once, so later ones read the coded cache

Packed = tuple[Tensor, Tensor, Tensor]


def encode(x_NG: Tensor, bits: int) -> Packed:
    """(codes (N, G bits / 8) uint8, s (N, 1), m (N, 1)) of groups that lie in rows."""
    low_N1, high_N1 = x_NG.amin(1, keepdim=True).half(), x_NG.amax(1, keepdim=True)
    step_N1 = ((high_N1 - low_N1.float()).clamp_min(0) / (2**bits - 1)).half()
    code_NG = ((x_NG - low_N1.float()) / step_N1.float().clamp_min(1e-30)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    shift_P = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed = (code_NG.view(len(code_NG), -1, 8 // bits) << shift_P).sum(-1).to(torch.uint8)
    return packed, step_N1, low_N1


def decode(coded: Packed, bits: int) -> Tensor:
    """x^ (N, G) float32."""
    packed, step_N1, low_N1 = coded
    shift_P = torch.arange(0, 8, bits, dtype=torch.uint8)
    code_NG = ((packed[..., None] >> shift_P) & (2**bits - 1)).flatten(1)
    return low_N1.float() + step_N1.float() * code_NG.float()


class KiviLayer(DynamicLayer):
    """One layer's cache; `keys` and `values` hold the exact end of it."""

    is_croppable = False
    keys: Any  # None until the first tokens
    values: Any

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.coded: list[tuple[Packed, Packed]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        past = [self._read(*pair, key_states, value_states) for pair in self.coded]
        keys = torch.cat([*(k for k, _ in past), self.keys], -2)
        values = torch.cat([*(v for _, v in past), self.values], -2)
        while self.keys.shape[-2] >= RESIDUAL + GROUP:
            key, value = self.keys[..., :GROUP, :], self.values[..., :GROUP, :]
            self.coded.append((encode(key.transpose(-1, -2).reshape(-1, GROUP).float(), self.bits),
                               encode(value.reshape(-1, GROUP).float(), self.bits)))
            self.keys, self.values = self.keys[..., GROUP:, :], self.values[..., GROUP:, :]
        return keys, values

    def _read(self, key: Packed, value: Packed, like_k: Tensor, like_v: Tensor) -> tuple[Tensor, Tensor]:
        (b, h, _, dk), dv = like_k.shape, like_v.shape[-1]
        return (decode(key, self.bits).view(b, h, dk, GROUP).transpose(-1, -2).to(like_k.dtype),
                decode(value, self.bits).view(b, h, GROUP, dv).to(like_v.dtype))

    def get_seq_length(self) -> int:
        return GROUP * len(self.coded) + super().get_seq_length()

    def nbytes(self) -> int:
        """Of the codes and scales, and of the exact tokens in 16 bits."""
        coded = sum(t.nbytes for pair in self.coded for packed in pair for t in packed)
        return coded + 2 * (self.keys.numel() + self.values.numel())


def caches(config: Any, bits: int) -> Cache:
    """An empty cache. Raises SupremumError for models whose layers it does not fit."""
    config = config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kinds != {"full_attention"} or width % GROUP:
        raise SupremumError(f"A kivi cache needs full attention in all layers and heads of a multiple of {GROUP} numbers.",
                            "Measure a .gguf file with llama.cpp's cache types.")
    layers: list[Any] = [KiviLayer(bits) for _ in range(config.num_hidden_layers)]
    return Cache(layers=layers)


@torch.inference_mode()
def answers(model: Any, window_T: Tensor, cache: Cache) -> Tensor:
    """Logits (T, V), read CHUNK tokens at a time through the cache."""
    rows = [model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0] for part in window_T.split(CHUNK)]
    return torch.cat(rows).float()


def evaluate_kivi(checkpoint: Any, windows: Tensor, bits: int) -> dict[str, Any]:
    """KL of the model with the coded cache to itself with an exact one, and the bytes of both."""
    caches(checkpoint.config, bits)  # refuse before the long work
    model, scores, nbytes = checkpoint.model(torch.float32), [], 0
    model.set_attn_implementation("sdpa")
    exact = 0
    with phase("decode with both caches", len(windows)) as advance:
        for window_T in windows:
            plain, cache = DynamicCache(config=model.config), caches(model.config, bits)
            p_TV, q_TV = answers(model, window_T, plain), answers(model, window_T, cache)
            scores.append(compare(p_TV[:-1], q_TV[:-1], window_T[1:]))
            ours: list[Any] = cache.layers
            theirs: list[Any] = plain.layers
            nbytes = sum(layer.nbytes() for layer in ours)
            exact = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in theirs)
            advance()
    found = summarise(scores)
    return {"found": found, "bytes": nbytes, "bytes_exact": exact}
