"""Checks before hours of work: does it fit the memory and the disk, and can the target hold it at all."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .allocate import Budget
from .checkpoint import Checkpoint
from .errors import BudgetError, SupremumError
from .sizes import format_size

BASE = 600_000_000  # the interpreter with PyTorch and Transformers


@dataclass(frozen=True)
class Needs:
    """Bytes a run needs: the largest resident memory of its phases, and the disk that its state takes."""

    memory: int
    disk: int


def needs(checkpoint: Checkpoint, menu: Any, shapes: dict[str, tuple[int, int]], *, tokens: int, blocks: int) -> Needs:
    """Upper estimates from shapes: one block and its moments, its candidates, the hidden states, the tables."""
    from . import codecs

    width = min((shape[1] for shape in shapes.values()), default=1)
    tables = [math.prod(shape) for name, shape in shapes.items() if "layers" not in name and "layer." not in name]
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
    from . import codecs

    best = {name: min(names, key=lambda codec: codecs.get(codec).nbytes(shapes[name]))
            for name, names in menu.codecs.items() if names}
    if not best:
        raise SupremumError(f"{checkpoint.source}: the {target.name} target has no format for any of its layers.",
                            "Choose another --target, or --keep less.")
    for tie in menu.ties:
        shared = [codec for codec in menu.codecs[tie[0]] if all(codec in menu.codecs[name] for name in tie)]
        least = min(shared, key=lambda codec: sum(codecs.get(codec).nbytes(shapes[name]) for name in tie))
        best |= dict.fromkeys(tie, least)
    smallest = target.size(checkpoint, best)
    if budget.size is not None and budget.size < smallest:
        raise BudgetError(f"{format_size(budget.size)} is too small: the smallest {target.name} file of this model is "
                          f"{format_size(smallest)} ({smallest} bytes).", f"Ask for --size {smallest} or more.")
    blocks = checkpoint.config.get_text_config().num_hidden_layers
    wanted = needs(checkpoint, menu, shapes, tokens=tokens, blocks=blocks)
    free = psutil.virtual_memory().available
    if wanted.memory > free:
        raise SupremumError(f"this run needs about {format_size(wanted.memory)} of memory, {format_size(free)} is free.",
                            "Close other programs, or give fewer --tokens.")
    place = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    disk = shutil.disk_usage(place).free
    if wanted.disk > disk:
        raise SupremumError(f"{place}: this run needs about {format_size(wanted.disk)} of disk, {format_size(disk)} is "
                            "free.", "Free space, or choose another --out.")
    return wanted
