"""compressed-tensors folders: packed integers with scales, decoded to float32.

    w = scale * (q - zero)      q: b-bit numbers, a row's as one stream in int32 words

`weight_packed` (O, ceil(I b / 32)), `weight_scale` (O, G), `weight_shape` (2,), for asymmetric grids
`weight_zero_point` (ceil(O b / 32), G), after activation ordering `weight_g_idx` (I,); or, unpacked, `weight` int8
(https://github.com/vllm-project/compressed-tensors). The tensors describe themselves; the config must agree with them.
Products are exact in float32: rounded to the scale's dtype they are what stock Transformers computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs.integer import unpack_bits
from ..errors import CheckpointError
from .architecture import TensorInfo
from .hf import SafetensorsStore
from .safetensors_file import DTYPES

FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
ORIGINAL = "Use the original model."


class CompressedStore:
    """Logical weights over the stored pieces; tensors that are not quantised pass through."""

    def __init__(self, inner: SafetensorsStore, settings: dict[str, Any], config_path: Path) -> None:
        self._inner = inner
        self._path = config_path
        self._declared = declared(settings, config_path)
        self._pieces: dict[str, dict[str, str]] = {}
        for name in inner.entries:
            base, _, part = name.rpartition(".")
            if part in PARTS:
                self._pieces.setdefault(f"{base}.weight", {})[part] = name
        for weight, pieces in self._pieces.items():
            if "weight_packed" not in pieces and weight in inner.entries:
                pieces["weight"] = weight
        consumed = {name for pieces in self._pieces.values() for name in pieces.values()}
        self.entries: dict[str, TensorInfo] = {n: i for n, i in inner.entries.items() if n not in consumed}
        self._bits: dict[str, int] = {}
        for weight in self._pieces:
            self._bits[weight], self.entries[weight] = self._describe(weight)

    def file(self, name: str) -> Path:
        return self._inner.file(next(iter(self._pieces[name].values())) if name in self._pieces else name)

    def read(self, name: str) -> Tensor:
        """The weight; quantised ones as float32 (O, I)."""
        if name not in self._pieces:
            return self._inner.read(name)
        pieces = {part: self._inner.read(stored) for part, stored in self._pieces[name].items()}
        rows, columns = self.entries[name].shape
        bits = self._bits[name]
        if "weight_packed" in pieces:
            codes_OI = unpack_bits(pieces["weight_packed"], bits, columns)
            middle = 1 << (bits - 1)
        else:
            codes_OI, middle = pieces["weight"], 0
        scale_OG = pieces["weight_scale"].float()
        zero_OG = torch.full_like(scale_OG, middle)
        if "weight_zero_point" in pieces:
            zero = pieces["weight_zero_point"]
            zero_OG = unpack_bits(zero.T.contiguous(), bits, rows).T.float() if middle else zero.float()
        groups = scale_OG.shape[1]
        if "weight_g_idx" in pieces:
            group_I = pieces["weight_g_idx"].long()
            if group_I.shape != (columns,) or int(group_I.min()) < 0 or int(group_I.max()) >= groups:
                raise CheckpointError(f"{self.file(name)}: {name} has a group index outside its groups.",
                                      "Download the model again.")  # fmt: skip
            return (codes_OI.float() - zero_OG[:, group_I]) * scale_OG[:, group_I]
        value_OGS = codes_OI.view(rows, groups, -1).float() - zero_OG[..., None]
        return value_OGS.mul_(scale_OG[..., None]).view(rows, columns)

    def _describe(self, weight: str) -> tuple[int, TensorInfo]:
        """Bits a code, and what the weight is, from the shapes and dtypes of its pieces."""
        pieces = self._pieces[weight]
        info = {part: self._inner.entries[stored] for part, stored in pieces.items()}

        def refuse(cause: str) -> CheckpointError:
            return CheckpointError(f"{self._inner.file(next(iter(pieces.values())))}: {weight} {cause}.",
                                   "Download the model again.")  # fmt: skip

        scale, nbytes = info.get("weight_scale"), sum(i.nbytes for i in info.values())
        codes = info.get("weight_packed") or info.get("weight")
        if scale is None or codes is None or len(codes.shape) != 2 or len(scale.shape) != 2:
            raise refuse("lacks its packed numbers or its scales")
        if not DTYPES[scale.kind].is_floating_point or codes.kind != ("I32" if "weight_packed" in info else "I8"):
            raise refuse(f"has codes of type {codes.kind} and scales of type {scale.kind}")
        rows, columns, bits = codes.shape[0], codes.shape[1], 8
        if "weight_packed" in info:
            shape = info.get("weight_shape")
            if shape is None or shape.shape != (2,) or shape.kind not in ("I64", "I32"):
                raise refuse("lacks its shape")
            rows, columns = (int(n) for n in self._inner.read(pieces["weight_shape"]).tolist())
            found = [b for b in range(1, 9) if codes.shape == (rows, -(-columns * b // 32))]
            if rows < 1 or columns < 1 or len(found) != 1:
                raise refuse(f"is packed into {codes.shape}, which is not its shape ({rows}, {columns})")
            bits = found[0]
        groups = scale.shape[1]
        if scale.shape[0] != rows or groups < 1 or columns % groups:
            raise refuse(f"has scales {scale.shape} for a shape of ({rows}, {columns})")
        zero = info.get("weight_zero_point")
        if zero is not None and "weight_packed" in info and (
                zero.kind != "I32" or zero.shape != (-(-rows * bits // 32), groups)):  # fmt: skip
            raise refuse(f"has zero points {zero.shape} {zero.kind}")
        if zero is not None and "weight" in info and zero.shape != scale.shape:
            raise refuse(f"has zero points {zero.shape}")
        if (bits, columns // groups) in self._declared:
            grouping = f"g{columns // groups}"
        elif groups == 1 and (bits, 0) in self._declared:
            grouping = "channel"
        else:
            raise CheckpointError(f"{self._path}: declares no weights of {bits} bits in groups of {columns // groups}, "
                                  f"which {weight} has.", "Download the model again.")  # fmt: skip
        return bits, TensorInfo(weight, (rows, columns), f"int{bits}{'a' if zero else ''}-{grouping}", nbytes)


def declared(settings: dict[str, Any], path: Path) -> set[tuple[int, int]]:
    """(bits, group size or 0 for a whole row) of each of the config's groups; schemes beyond weights are refused."""
    if settings.get("format") not in FORMATS:
        raise CheckpointError(f"{path}: format {str(settings.get('format'))[:40]!r} of compressed-tensors is not read.",
                              f"Known are {', '.join(FORMATS)}. {ORIGINAL}")  # fmt: skip
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = settings.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(f"{path}: the quantisation has a {key}, which is not read here.", ORIGINAL)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{path}: the quantisation has no config_groups.", "Download the model again.")
    found: set[tuple[int, int]] = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        width = weights.get("num_bits") if isinstance(weights, dict) and weights.get("type", "int") == "int" else None
        if not isinstance(width, int):
            raise CheckpointError(f"{path}: {name} does not hold integer weights.", ORIGINAL)
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(f"{path}: {name} quantises activations too, which is not read here.", ORIGINAL)
        assert isinstance(weights, dict)
        size = weights.get("group_size")
        found.add((width, size if isinstance(size, int) and size > 0 else 0))
    return found
