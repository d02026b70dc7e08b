"""compressed-tensors folders: packed integers or small floats with scales, decoded to float32.

    w = scale * (q - zero)      q: b-bit numbers, a row's as one stream in int32 words

`weight_packed` (O, ceil(I b / 32)), `weight_scale` (O, G), `weight_shape` (2,), for asymmetric grids
`weight_zero_point` (ceil(O b / 32), G), after activation ordering `weight_g_idx` (I,); or, unpacked, `weight` int8 or E4M3;
or a microscaling format or NVFP4 (codecs/floats.py) (https://github.com/vllm-project/compressed-tensors). The tensors
describe themselves; the config must agree with them. Products are exact in float32: rounded to the scale's dtype they are
what stock Transformers computes. Only grids with zero points are rounded so here, as Transformers reads them no other way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import codecs
from ..codecs import decode_grid
from ..codecs.integer import unpack_bits
from ..codecs.layout import TOKEN, grouping
from ..errors import CheckpointError
from .architecture import TensorInfo
from .hf import SafetensorsStore
from .safetensors_file import DTYPES

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
           "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized")  # fmt: skip
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
ORIGINAL = "Use the original model."
TILE = 128  # rows and columns that share a scale of the block strategy
Pieces = dict[str, TensorInfo]


class CompressedStore:
    """Logical weights over the stored pieces; tensors that are not quantised pass through."""

    def __init__(self, inner: SafetensorsStore, settings: dict[str, Any], config_path: Path) -> None:
        self._inner = inner
        self._path = config_path
        self._declared = declared(settings, config_path)
        self._pieces = {f"{base}.weight": pieces for base, pieces in inner.pieces(PARTS).items()}
        for weight, pieces in self._pieces.items():
            if "weight_packed" not in pieces and weight in inner.entries:
                pieces["weight"] = weight
        consumed = {name for pieces in self._pieces.values() for name in pieces.values()}
        self.entries: dict[str, TensorInfo] = {n: i for n, i in inner.entries.items() if n not in consumed}
        for weight in self._pieces:
            self.entries[weight] = self._describe(weight)

    def file(self, name: str) -> Path:
        return self._inner.file(next(iter(self._pieces[name].values())) if name in self._pieces else name)

    def read(self, name: str) -> Tensor:
        """The weight; quantised ones as float32 (O, I)."""
        if name not in self._pieces:
            return self._inner.read(name)
        pieces = {part: self._inner.read(stored) for part, stored in self._pieces[name].items()}
        (rows, columns), kind = self.entries[name].shape, self.entries[name].kind
        if kind.startswith(("mxfp", "nvfp")):
            codec = codecs.get(kind)
            return decode_grid(codec, *codec.unpack(pieces, (rows, columns)))
        scale_OG = pieces["weight_scale"].float()
        if kind.startswith("fp8"):
            if kind == "fp8-b128":
                scale_OG = scale_OG.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
            return pieces["weight"].float() * scale_OG
        if "weight_packed" in pieces:
            bits = _bits(pieces["weight_packed"].shape, (rows, columns))
            codes_OI = unpack_bits(pieces["weight_packed"], bits, columns)
            middle = 1 << (bits - 1)
        else:
            codes_OI, bits, middle = pieces["weight"], 8, 0
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
        value_OI = value_OGS.mul_(scale_OG[..., None]).view(rows, columns)
        return value_OI.to(pieces["weight_scale"].dtype).float() if "weight_zero_point" in pieces else value_OI

    def _describe(self, weight: str) -> TensorInfo:
        """What the weight is, from the shapes and dtypes of its pieces; its kind must be one that the config declares."""
        pieces = self._pieces[weight]
        info = {part: self._inner.entries[stored] for part, stored in pieces.items()}

        def refuse(cause: str) -> CheckpointError:
            return CheckpointError(f"{self._inner.file(next(iter(pieces.values())))}: {weight} {cause}.",
                                   "Download the model again.")  # fmt: skip

        scale, nbytes = info.get("weight_scale"), sum(i.nbytes for i in info.values())
        codes = info.get("weight_packed") or info.get("weight")
        if scale is None or codes is None or len(codes.shape) != 2 or len(scale.shape) != 2:
            raise refuse("lacks its packed numbers or its scales")
        try:
            if codes.kind in ("U8", "F8_E4M3"):
                name, shape = _small_float(info, codes, scale)
                names = [name]
            elif codes.kind == ("I32" if "weight_packed" in info else "I8") and DTYPES[scale.kind].is_floating_point:
                shape = codes.shape
                if "weight_packed" in info:
                    stored = info.get("weight_shape")
                    if stored is None or stored.shape != (2,) or stored.kind not in ("I64", "I32"):
                        raise ValueError("lacks its shape")
                    shape = tuple(int(n) for n in self._inner.read(pieces["weight_shape"]).tolist())
                names = _integer(info, codes, scale, shape)
            else:
                raise ValueError(f"has codes of type {codes.kind} and scales of type {scale.kind}")
        except ValueError as error:
            raise refuse(str(error)) from error
        return TensorInfo(weight, shape, self._as_declared(weight, names), nbytes)

    def _as_declared(self, weight: str, names: list[str]) -> str:
        """The first of these kinds that the config declares; with rounded inputs, where it says so for this layer."""
        kinds = [kind for name in names for kind in (name, f"{name}-a8") if kind in self._declared]
        if len(kinds) > 1:
            module = weight.removesuffix(".weight")
            kinds = [kind for kind in kinds if module in self._declared[kind]]
        if len(kinds) != 1:
            raise CheckpointError(f"{self._path}: declares no weights of {' or '.join(names)}, which {weight} has.",
                                  "Download the model again.")  # fmt: skip
        return kinds[0]


def _bits(packed: tuple[int, ...], shape: tuple[int, ...]) -> int:
    rows, columns = shape
    found = [b for b in range(1, 9) if tuple(packed) == (rows, -(-columns * b // 32))]
    if rows < 1 or columns < 1 or len(found) != 1:
        raise ValueError(f"is packed into {tuple(packed)}, which is not its shape ({rows}, {columns})")
    return found[0]


def _integer(info: Pieces, codes: TensorInfo, scale: TensorInfo, shape: tuple[int, ...]) -> list[str]:
    """The kinds of integers that these pieces may be. Raises ValueError with what is wrong."""
    rows, columns = shape
    packed = "weight_packed" in info
    bits = _bits(codes.shape, shape) if packed else 8
    groups = scale.shape[1]
    if scale.shape[0] != rows or groups < 1 or columns % groups:
        raise ValueError(f"has scales {scale.shape} for a shape of ({rows}, {columns})")
    zero = info.get("weight_zero_point")
    if zero is not None and packed and (zero.kind != "I32" or zero.shape != (-(-rows * bits // 32), groups)):
        raise ValueError(f"has zero points {zero.shape} {zero.kind}")
    if zero is not None and not packed and zero.shape != scale.shape:
        raise ValueError(f"has zero points {zero.shape}")
    sizes = (columns, 0) if groups == 1 else (columns // groups,)
    return [f"{'uint' if zero else 'int'}{bits}-{grouping(size)}" for size in sizes]


def _small_float(info: Pieces, codes: TensorInfo, scale: TensorInfo) -> tuple[str, tuple[int, ...]]:
    """Kind and shape of the floats in these pieces. Raises ValueError with what is wrong."""
    rows, width = codes.shape
    whole = info.get("weight_global_scale")
    fine = width // scale.shape[1] if scale.shape[1] and width % scale.shape[1] == 0 and scale.shape[0] == rows else 0
    name, bits = {("F8_E4M3", "U8", 32): ("mxfp8-g32", 8), ("U8", "U8", 16): ("mxfp4-g32", 4),
                  ("U8", "U8", 24): ("mxfp6-g32", 6), ("U8", "F8_E4M3", 8): ("nvfp4-g16", 4),
                  }.get((codes.kind, scale.kind, fine), ("", 8))  # fmt: skip
    if codes.kind == "F8_E4M3" and scale.kind in ("BF16", "F16", "F32"):
        tiles = -(-rows // TILE), -(-width // TILE)
        name = "fp8-channel" if scale.shape == (rows, 1) else "fp8-b128" if scale.shape == tiles else ""
    if not name or (whole is not None) != (name == "nvfp4-g16"):
        raise ValueError(f"has codes {codes.shape} of type {codes.kind} and scales {scale.shape} of type {scale.kind}")
    if whole is not None and (whole.shape != (1,) or not DTYPES[whole.kind].is_floating_point):
        raise ValueError(f"has a scale of the matrix of shape {whole.shape}")
    return name, (rows, width * 8 // bits)


def declared(settings: dict[str, Any], path: Path) -> dict[str, list[str]]:
    """The kinds of weights that the config's groups declare, and whose they are; schemes that are not read are refused."""
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
    found: dict[str, list[str]] = {}
    for name, group in groups.items():
        group = group if isinstance(group, dict) else {}
        weights = group.get("weights")
        kind = _kind(weights) if isinstance(weights, dict) else None
        if kind is None or not isinstance(weights, dict):
            raise CheckpointError(f"{path}: {name} does not hold weights of a kind that is read here.", ORIGINAL)
        inputs = group.get("input_activations")
        if inputs and isinstance(inputs, dict) and kind in ("int8-channel", "fp8-channel") and \
                all(inputs.get(key, TOKEN[key]) == TOKEN[key] for key in TOKEN) and \
                inputs.get("type", "int") == weights.get("type", "int"):  # fmt: skip
            kind += "-a8"
        elif inputs or group.get("output_activations"):
            raise CheckpointError(f"{path}: {name} quantises activations in a way that is not read here.", ORIGINAL)
        targets = group.get("targets")
        found.setdefault(kind, []).extend(targets if isinstance(targets, list) else [])
    return found


def _kind(weights: dict[str, Any]) -> str | None:
    """The name of what a scheme's `weights` describe; None if it is not known."""
    bits, size = weights.get("num_bits"), weights.get("group_size")
    size = size if isinstance(size, int) and size > 0 else 0
    if not isinstance(bits, int):
        return None
    if weights.get("type", "int") == "int":
        return f"{'int' if weights.get('symmetric', True) else 'uint'}{bits}-{grouping(size)}"
    if weights.get("type") != "float" or not weights.get("symmetric", True):
        return None
    if bits == 8 and weights.get("strategy") == "block" and weights.get("block_structure") == [TILE, TILE]:
        return "fp8-b128"
    return {(4, 16): "nvfp4-g16", (4, 32): "mxfp4-g32", (6, 32): "mxfp6-g32", (8, 32): "mxfp8-g32",
            (8, 0): "fp8-channel"}.get((bits, size))  # fmt: skip
