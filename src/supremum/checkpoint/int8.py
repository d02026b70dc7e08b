"""The target `int8`: an archive's integers as bytes, with their row and column scales, exactly.

    w = (integers * row_scale[:, None]) * column_scale        float32, in this order: the archive's own decoding, to the bit

For kernels and programs of other makers. In model.safetensors, for each coded matrix NAME (O, I):

    NAME.integers      int8 (O, I)         0 where the integer does not fit
    NAME.row_scale     float32 (O,)        NAME.column_scale   float32 (I,)
    NAME.overflow      int16 (n,)          those integers, absent if there are none
    NAME.overflow_at   int64 (n,)          their places, counted row by row

Other tensors lie there as they are; bfloat16 matrices that the archive codes without loss are bfloat16 again. config.json has
quantization_config {"quant_method": "supremum-int8", "version": 1, "transposed": names of the tensors that are w^T}. No stock
runtime reads it; `supremum` opens it as a model, and the proof is that every tensor comes back to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs.lattice import Lattice
from ..errors import CheckpointError
from ..progress import note
from ..workspace import write_atomic
from .architecture import TensorInfo
from .hf import SINGLE, SafetensorsStore
from .write_compressed_tensors import Prepared, config_of, kept, to_json
from .write_safetensors import SafetensorsWriter, Spec

METHOD, VERSION = "supremum-int8", 1
PARTS = ("integers", "row_scale", "column_scale", "overflow", "overflow_at")
FIT = 127  # largest integer of one byte that is used; -128 is not
DAMAGED = "It is truncated or damaged; convert the archive again."


def parts_of(matrix: Lattice) -> dict[str, Tensor]:
    """The stored tensors of one matrix, by the last word of their names."""
    row_O, column_I = matrix.frame.scales()
    integers_OI = matrix.integers_OI
    outside_OI = (integers_OI > FIT) | (integers_OI < -FIT)
    parts = {"integers": integers_OI.masked_fill(outside_OI, 0).to(torch.int8), "row_scale": row_O, "column_scale": column_I}
    if bool(outside_OI.any()):
        parts |= {"overflow": integers_OI[outside_OI], "overflow_at": outside_OI.flatten().nonzero()[:, 0]}
    return parts


class Int8Target:
    """What `supremum.checkpoint.targets.Target` promises to `convert`; `optimize` finds no codec in it."""

    name = "int8"
    runtime = ""  # none reads it
    menu: tuple[str, ...] = ()
    least: tuple[str, ...] = ()
    allocates = False

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        """None: only an archive is converted to it."""
        return []

    def ties(self, checkpoint: Any) -> list[list[str]]:
        return []

    def together(self, names: Collection[str]) -> None:
        """Nothing to choose, nothing to refuse."""

    def write(self, checkpoint: Any, coded: Mapping[str, Any], folder: Path) -> Path:
        """The folder's files, each whole or not there; config.json last. One matrix is in memory at a time."""
        names = [name for name, info in checkpoint.tensors.items() if info.kind == "lattice"]
        if not names:
            raise CheckpointError(f"{checkpoint.source}: holds no archive's integers, which --target int8 is for.",
                                  "Give an archive (optimize --target archive), or choose another --target.")
        prepared = Prepared(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        specs: list[Spec] = []
        transposed: list[str] = []
        overflow: dict[str, int] = {}
        for name in names:
            matrix, turned = checkpoint.lattice(name)
            parts = parts_of(matrix)
            specs += [Spec(f"{name}.{part}", value.dtype, tuple(value.shape)) for part, value in parts.items()]
            transposed += [name] if turned else []
            overflow |= {name: len(parts["overflow"])} if "overflow" in parts else {}
        rest = {name: kept(prepared, name, info) for name, info in checkpoint.tensors.items() if info.kind != "lattice"}
        with SafetensorsWriter(folder / SINGLE, [*specs, *rest.values()]) as out:
            for name in names:
                for part, value in parts_of(checkpoint.lattice(name)[0]).items():
                    out.put(f"{name}.{part}", value)
            for name, spec in rest.items():
                out.put(name, checkpoint.read(name).to(spec.dtype))
        if overflow:
            note(f"{sum(overflow.values()):,} integers in {len(overflow)} of {len(names)} matrices do not fit a byte; they "
                 "lie beside them as int16.")
        settings = {"quant_method": METHOD, "version": VERSION, "transposed": transposed}
        files = prepared.files | {"config.json": to_json(config_of(checkpoint, prepared) | {"quantization_config": settings})}
        for file in sorted(files, key=lambda name: (name == "config.json", name)):
            write_atomic(folder / file, files[file])
        return folder


class Int8Store:
    """Logical weights over the stored integers; other tensors pass through."""

    def __init__(self, inner: SafetensorsStore, settings: Mapping[str, Any], config_path: Path) -> None:
        transposed = settings.get("transposed")
        if settings.get("version") != VERSION or not isinstance(transposed, list):
            raise CheckpointError(f"{config_path}: {METHOD} of version {str(settings.get('version'))[:20]!r}.",
                                  "Upgrade supremum, or convert the archive again.")  # fmt: skip
        self._inner, self._transposed = inner, set(map(str, transposed))
        self._parts = inner.pieces(PARTS)
        consumed = {stored for parts in self._parts.values() for stored in parts.values()}
        self.entries = {name: info for name, info in inner.entries.items() if name not in consumed}
        for name in self._parts:
            self.entries[name] = self._describe(name)

    def file(self, name: str) -> Path:
        return self._inner.file(next(iter(self._parts[name].values())) if name in self._parts else name)

    def read(self, name: str) -> Tensor:
        """The weight; that of integers as float32."""
        if name not in self._parts:
            return self._inner.read(name)
        parts = {part: self._inner.read(stored) for part, stored in self._parts[name].items()}
        weight_OI = parts["integers"].float()
        if "overflow" in parts:
            at = parts["overflow_at"]
            if int(at.min()) < 0 or int(at.max()) >= weight_OI.numel():
                raise CheckpointError(f"{self.file(name)}: {name} has an integer outside its matrix.", DAMAGED)
            weight_OI.view(-1)[at] = parts["overflow"].float()
        weight_OI.mul_(parts["row_scale"][:, None]).mul_(parts["column_scale"])
        return weight_OI.T.contiguous() if name in self._transposed else weight_OI

    def _describe(self, name: str) -> TensorInfo:
        info = {part: self._inner.entries[stored] for part, stored in self._parts[name].items()}
        integers, overflow = info.get("integers"), info.get("overflow")
        shape = integers.shape if integers else ()
        wanted = {"integers": (shape, "I8"), "row_scale": (shape[:1], "F32"), "column_scale": (shape[1:], "F32")}
        if overflow:
            wanted |= {"overflow": (overflow.shape[:1], "I16"), "overflow_at": (overflow.shape[:1], "I64")}
        found = {part: (value.shape, value.kind) for part, value in info.items()}
        if len(shape) != 2 or found != wanted or 0 in shape or (overflow and overflow.shape == (0,)) or name in self.entries:
            raise CheckpointError(f"{self.file(name)}: {name} has parts that do not belong together.", DAMAGED)
        return TensorInfo(name, shape[::-1] if name in self._transposed else shape, "int8",
                          sum(value.nbytes for value in info.values()))


def check_exact(checkpoint: Any, reread: Any) -> None:
    """Raise CheckpointError unless every tensor of `reread` is that of `checkpoint` to the bit."""
    for name in checkpoint.tensors:
        one, other = checkpoint.read(name), reread.read(name)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise CheckpointError(f"{reread.path}: {name} is not what was written.", "Check the disk; please report this.")
