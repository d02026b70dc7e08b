"""Checks before hours of work: does it fit the memory and the disk, and can the target hold it at all."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from . import codecs
from .allocate import Budget
from .checkpoint import Checkpoint
from .errors import BudgetError, SupremumError
from .gather import work_folder
from .limits.topology import memory_limit
from .sizes import format_size

BASE = 600_000_000  # the interpreter with PyTorch and Transformers


@dataclass(frozen=True)
class Needs:
    """Bytes a run needs: the largest resident memory of its phases, and the disk that its state takes."""

    memory: int
    disk: int


def needs(checkpoint: Checkpoint, menu: Any, shapes: dict[str, tuple[int, int]], *, tokens: int, blocks: int) -> Needs:
    """Upper estimates from shapes: one block and its moments, its candidates, the hidden states, the tables."""
    width = min((shape[1] for shape in shapes.values()), default=1)
    tables = [math.prod(shape) for name, shape in shapes.items() if not any(part.isdigit() for part in name.split("."))]
    inner = sum(math.prod(shape) for shape in shapes.values()) - sum(tables)
    largest_input = max(shape[1] for shape in shapes.values())
    largest = max(math.prod(shape) for shape in shapes.values())
    block = inner // max(blocks, 1)
    hidden = 2 * tokens * width
    moments = 4 * (largest_input**2 + 3 * width**2)
    activations = 2 * tokens * (largest_input + 3 * width)
    most = max((len(names) for names in menu.codecs.values()), default=1)
    memory = BASE + 8 * block + 3 * moments + 3 * hidden + activations + max(4 * largest * 3, 2 * most * block)
    solved = sum(codecs.get(codec).nbytes(shapes[name]) for name, names in menu.codecs.items() for codec in names)
    disk = solved + blocks * (moments + 2 * hidden) + 3 * sum(info.nbytes for info in checkpoint.tensors.values())
    return Needs(memory, disk)


def preflight(checkpoint: Checkpoint, target: Any, budget: Budget, out: Path, menu: Any, shapes: dict[str, tuple[int, int]],
              *, tokens: int) -> Needs:
    """Refuse now what could not end well. Raises SupremumError or BudgetError naming the cause and the remedy."""
    if not any(menu.codecs.values()):
        raise SupremumError(f"{checkpoint.source}: the {target.name} target has no format for any of its layers.",
                            "Choose another --target, or --keep less.")
    if budget.size is not None and budget.size < (smallest := smallest_size(checkpoint, target, menu, shapes)):
        raise BudgetError(f"{format_size(budget.size)} is too small: the smallest {target.name} file of this model is "
                          f"{format_size(smallest)} ({smallest} bytes).", f"Ask for --size {smallest} or more.")
    blocks = checkpoint.config.get_text_config().num_hidden_layers
    wanted = needs(checkpoint, menu, shapes, tokens=tokens, blocks=blocks)
    free = min(psutil.virtual_memory().available, memory_limit())
    if wanted.memory > free:
        raise SupremumError(f"this run needs about {format_size(wanted.memory)} of memory, {format_size(free)} is free.",
                            "Close other programs, or give fewer --tokens.")
    place = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    work = work_folder(out)  # what an interrupted run left there is part of what this one needs
    disk = shutil.disk_usage(place).free + sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if wanted.disk > disk:
        raise SupremumError(f"{place}: this run needs about {format_size(wanted.disk)} of disk, {format_size(disk)} is "
                            "free.", "Free space, or choose another --out.")
    return wanted


def smallest_size(checkpoint: Checkpoint, target: Any, menu: Any, shapes: dict[str, tuple[int, int]]) -> int:
    """Bytes of the smallest result: every tensor in its smallest codec, or as it is where that is smaller."""
    tied = {name: tuple(tie) for tie in menu.ties for name in tie}
    plan: dict[str, str] = {}
    units = dict.fromkeys(tied.get(name, (name,)) for name, names in menu.codecs.items() if names)
    for unit in units:
        shared = [codec for codec in menu.codecs[unit[0]] if all(codec in menu.codecs[name] for name in unit)]
        if shared:
            least = min(shared, key=lambda codec: sum(codecs.get(codec).nbytes(shapes[name]) for name in unit))
            plan |= dict.fromkeys(unit, least)
    smallest: int = target.size(checkpoint, plan)
    for unit in units:
        without = target.size(checkpoint, {name: codec for name, codec in plan.items() if name not in unit})
        if without < smallest:
            plan, smallest = {name: codec for name, codec in plan.items() if name not in unit}, without
    return smallest
