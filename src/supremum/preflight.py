"""Checks before hours of work: does it fit the memory and the disk, and can the target hold it at all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import codecs
from .allocate import Budget
from .checkpoint import Checkpoint
from .checkpoint.targets import Target
from .errors import SupremumError
from .limits.topology import memory_limit
from .planning import Menu, check_feasible, units_of
from .sizes import format_size
from .workspace import work_folder

BASE = 600_000_000  # the interpreter with PyTorch and Transformers


@dataclass(frozen=True)
class Needs:
    """Bytes a run needs: the largest resident memory of its phases, and the disk that its state takes."""

    memory: int
    disk: int


def needs(checkpoint: Checkpoint, menu: Menu, shapes: Mapping[str, tuple[int, int]], tables: Collection[str], *, tokens: int,
          blocks: int, item: int) -> Needs:
    """Upper estimates from shapes: one block and its moments, its candidates, the hidden states, the tables.

    tokens: calibration and held-out. blocks: of the model. item: bytes of a value of the forward passes (4 for float32).
    """
    width = min((shape[1] for shape in shapes.values()), default=1)
    inner = sum(math.prod(shape) for name, shape in shapes.items() if name not in tables)
    largest_input = max(shape[1] for shape in shapes.values())
    largest = max(math.prod(shape) for shape in shapes.values())
    block = inner // max(blocks, 1)
    hidden = item * tokens * width
    moments = 4 * (largest_input**2 + 3 * width**2)
    seen = 2 * item * tokens * (largest_input + 4 * width)  # of the original and of the compressed model: solve/walk.py
    most = max((len(names) for names in menu.codecs.values()), default=1)
    memory = BASE + 8 * block + 3 * moments + 3 * hidden + seen + max(4 * largest * 5, item * most * block)
    solved = sum(2 * math.prod(shapes[name]) if codec == "lattice" else codecs.get(codec).nbytes(shapes[name])
                 for name, names in menu.codecs.items() for codec in names)
    disk = solved + blocks * (moments + 2 * hidden) + 3 * sum(info.nbytes for info in checkpoint.tensors.values())
    return Needs(memory, disk)


def preflight(checkpoint: Checkpoint, target: Target, budgets: Sequence[Budget], out: Path, menu: Menu,
              shapes: Mapping[str, tuple[int, int]], tables: Collection[str], *, tokens: int, blocks: int, item: int,
              ) -> Needs:
    """Refuse now what could not end well. Raises SupremumError or BudgetError naming the cause and the remedy.

    budgets: those of the run, each of which leaves a result.
    """
    if not any(menu.codecs.values()):
        raise SupremumError(f"{checkpoint.source}: the {target.name} target has no format for any of its layers.",
                            "Choose another --target, or --keep less.")
    if target.allocates:
        units = units_of(checkpoint, target, menu, shapes, tables)
        for budget in budgets:
            check_feasible(budget, units, checkpoint, target)
    wanted = needs(checkpoint, menu, shapes, tables, tokens=tokens, blocks=blocks, item=item)
    free = min(psutil.virtual_memory().available, memory_limit())
    if wanted.memory > free:
        raise SupremumError(f"this run needs about {format_size(wanted.memory)} of memory, {format_size(free)} is free.",
                            "Close other programs, or give fewer --tokens.")
    place = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    work = work_folder(out)  # what an interrupted run left there is part of what this one needs
    disk = shutil.disk_usage(place).free + sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    others = (len(budgets) - 1) * sum(info.nbytes for info in checkpoint.tensors.values())
    if wanted.disk + others > disk:
        raise SupremumError(f"{place}: this run needs about {format_size(wanted.disk + others)} of disk, "
                            f"{format_size(disk)} is free.", "Free space, or choose another --out.")
    return wanted
