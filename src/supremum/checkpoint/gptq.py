"""GPTQ folders of versions 1 and 2: integers packed along the inputs, decoded to float32.

    w[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])

    qweight (I b / 32, O), qzeros (G, ceil(O b / 32)), scales (G, O), g_idx (I,), which may be missing: even groups

in words of 32 bits, for b = 2, 3, 4, 8 (https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear). Version 2 stores the
zero points themselves. Version 1 stores them less one, taken off and put back as GPTQModel does: off the whole word, so
that a zero point of 0 borrows from its neighbour, except at 3 bits, where each number wraps round by itself. The tensors
describe themselves; the config must agree with them. Products are exact in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..codecs.gptq import BITS, BLOCK
from ..codecs.integer import pack_bits, unpack_bits
from ..errors import CheckpointError
from .architecture import TensorInfo, build
from .hf import SafetensorsStore
from .safetensors_file import DTYPES

FORMATS = {"gptq": 1, "gptq_v2": 2}  # version by `checkpoint_format`
PARTS = ("qweight", "qzeros", "scales", "g_idx")
ORIGINAL, DAMAGED = "Use the original model.", "Download the model again."


class GPTQStore:
    """Logical weights over the stored pieces; tensors that are not quantised pass through."""

    def __init__(self, inner: SafetensorsStore, settings: dict[str, Any], config: PretrainedConfig,
                 config_path: Path) -> None:
        self._inner = inner
        self._version = version(settings, config_path)
        if any(isinstance(module, Conv1D) for module in build(config, config_path, real_buffers=False).modules()):
            raise CheckpointError(f"{config_path}: layers that store the transpose are not read from GPTQ.", ORIGINAL)
        self._pieces = {f"{base}.weight": pieces for base, pieces in inner.pieces(PARTS).items()}
        consumed = {name for pieces in self._pieces.values() for name in pieces.values()}
        self.entries: dict[str, TensorInfo] = {n: i for n, i in inner.entries.items() if n not in consumed}
        self._bits: dict[str, int] = {}
        for weight in self._pieces:
            self._bits[weight], self.entries[weight] = self._describe(weight)
        widths = set(self._bits.values())
        if not settings.get("dynamic") and widths - {settings.get("bits")}:
            raise CheckpointError(f"{config_path}: says {str(settings.get('bits'))[:20]} bits, the weights have "
                                  f"{', '.join(map(str, sorted(widths)))}.", DAMAGED)  # fmt: skip

    def file(self, name: str) -> Path:
        return self._inner.file(self._pieces[name]["qweight"] if name in self._pieces else name)

    def read(self, name: str) -> Tensor:
        """The weight; quantised ones as float32 (O, I)."""
        if name not in self._pieces:
            return self._inner.read(name)
        pieces = {part: self._inner.read(stored) for part, stored in self._pieces[name].items()}
        rows, columns = self.entries[name].shape
        bits, groups = self._bits[name], pieces["scales"].shape[0]
        code_OI = unpack_bits(pieces["qweight"].T.contiguous(), bits, columns).float()
        zero_OG, scale_OG = self._zeros(pieces["qzeros"], bits, rows).T.float(), pieces["scales"].T.float()
        group_I = pieces["g_idx"].long() if "g_idx" in pieces else torch.arange(columns) // -(-columns // groups)
        if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
            raise CheckpointError(f"{self.file(name)}: {name} has a group index outside its groups.", DAMAGED)
        return code_OI.sub_(zero_OG[:, group_I]).mul_(scale_OG[:, group_I])

    def _zeros(self, words_GW: Tensor, bits: int, rows: int) -> Tensor:
        """Zero points (G, O), uint8."""
        if self._version == 2:
            return unpack_bits(words_GW, bits, rows)
        if bits == 3:
            return (unpack_bits(words_GW, bits, rows) + 1) & 7
        ones = pack_bits(torch.ones(1, 32 // bits, dtype=torch.uint8), bits)
        return unpack_bits(words_GW + ones, bits, rows)  # int32 wraps round, as the word does

    def _describe(self, weight: str) -> tuple[int, TensorInfo]:
        """Bits a code, and what the weight is, from the shapes and dtypes of its pieces."""
        pieces = self._pieces[weight]
        info = {part: self._inner.entries[stored] for part, stored in pieces.items()}

        def refuse(cause: str) -> CheckpointError:
            return CheckpointError(f"{self._inner.file(next(iter(pieces.values())))}: {weight} {cause}.", DAMAGED)

        if weight in self.entries or any(part not in info for part in PARTS[:3]):
            raise refuse("lacks its packed numbers, zero points or scales, or is there as floats too")
        codes, zeros, scales = (info[part] for part in PARTS[:3])
        if (codes.kind, zeros.kind) != ("I32", "I32") or not DTYPES[scales.kind].is_floating_point:
            raise refuse(f"has codes of type {codes.kind}, zero points of type {zeros.kind}, scales of type {scales.kind}")
        if any(len(part.shape) != 2 or 0 in part.shape for part in (codes, zeros, scales)):
            raise refuse(f"is packed into {codes.shape} with scales {scales.shape} and zero points {zeros.shape}")
        (words, rows), groups = codes.shape, scales.shape[0]
        found = [b for b in BITS if zeros.shape == (groups, -(-rows * b // 32)) and words * 32 % b == 0]
        if scales.shape[1] != rows or len(found) != 1:
            raise refuse(f"has codes {codes.shape}, scales {scales.shape} and zero points {zeros.shape}, which do not belong "
                         "together")  # fmt: skip
        bits = found[0]
        columns = words * 32 // bits
        order = info.get("g_idx")
        if columns % BLOCK or groups > columns or (order is None and columns % groups):
            raise refuse(f"has {groups} groups for {columns} inputs")
        if order is not None and (order.shape != (columns,) or order.kind not in ("I32", "I64")):
            raise refuse(f"has a group index {order.shape} {order.kind} for {columns} inputs")
        grouping = f"g{-(-columns // groups)}" if groups > 1 else "channel"
        return bits, TensorInfo(weight, (rows, columns), f"gptq{bits}-{grouping}", sum(i.nbytes for i in info.values()))


def version(settings: dict[str, Any], path: Path) -> int:
    """1 or 2; other layouts are refused."""
    name = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    words = str(settings.get("pack_dtype", "int32")).removeprefix("torch.")
    if name not in FORMATS or words != "int32":
        raise CheckpointError(f"{path}: GPTQ format {str(name)[:40]!r}, packed in {words[:20]}, is not read.",
                              f"Known are {' and '.join(FORMATS)}, packed in int32. {ORIGINAL}")  # fmt: skip
    return FORMATS[name]
