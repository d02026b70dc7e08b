"""Refusals before the work: memory, disk, a size that no plan reaches, nothing to compress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from supremum import codecs
from supremum import preflight as module
from supremum.allocate import Budget
from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.checkpoint.targets import target
from supremum.errors import BudgetError, SupremumError
from supremum.planning import Menu, menu_of
from supremum.preflight import needs, preflight
from supremum.stats.streaming import BlockStream, orientation

TABLES = ["model.embed_tokens.weight"]
Case = tuple[Checkpoint, Any, Menu, dict[str, tuple[int, int]]]


@pytest.fixture(params=["gguf", "compressed-tensors"])
def case(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Case:
    """(checkpoint, target, menu, shapes) of the tiny Llama."""
    checkpoint, kind = open_checkpoint(tiny_model("llama", "bfloat16")), target(request.param)
    shapes = {name: shape for name, (shape, _) in orientation(BlockStream(checkpoint, dtype=torch.float32)).items()}
    return checkpoint, kind, menu_of(kind, checkpoint, shapes, []), shapes


def check(case: Case, tmp_path: Path, budget: Budget | None = None, menu: Menu | None = None) -> Any:
    checkpoint, kind, usual, shapes = case
    return preflight(checkpoint, kind, [budget or Budget(bits=8)], tmp_path / "out", menu or usual, shapes, TABLES,
                     tokens=4096, blocks=2, item=2)


def test_what_fits_passes_with_its_needs(case: Case, tmp_path: Path) -> None:
    found = check(case, tmp_path)
    assert 0.6e9 < found.memory < 1e9 and 1e6 < found.disk < 1e9  # a model of 0.2 M weights
    assert not (tmp_path / "out").exists()


def test_needs_grow_with_tokens_and_count_blocks_of_every_family(tiny_model: Callable[..., Path]) -> None:
    for family in ("llama", "gpt2", "bert"):
        checkpoint = open_checkpoint(tiny_model(family))
        shapes = {name: shape for name, (shape, _) in orientation(BlockStream(checkpoint, dtype=torch.float32)).items()}
        menu = Menu({name: ["Q4_0"] for name in shapes}, [])
        tables = BlockStream(checkpoint, dtype=torch.float32).tables()
        one, two, wide = (needs(checkpoint, menu, shapes, tables, tokens=tokens, blocks=2, item=item)
                          for tokens, item in ((10_000, 2), (20_000, 2), (10_000, 4)))
        assert two.memory > one.memory and two.disk > one.disk and wide.memory > one.memory and wide.disk > one.disk
        inner = {name: shape for name, shape in shapes.items() if name not in tables}
        half = sum(rows * columns for rows, columns in inner.values()) // 2
        fewer = needs(checkpoint, menu, shapes, tables, tokens=10_000, blocks=4, item=2)
        assert half > 10_000 and one.memory - fewer.memory == pytest.approx(8 * half / 2, rel=0.3)  # a block, float32 twice


def test_the_smallest_size_is_exact_and_named(case: Case, tmp_path: Path) -> None:
    """Of every plan: one byte less is refused, the size itself passes. Independent: each unit's smallest, by the target."""
    checkpoint, kind, menu, _ = case
    plan: dict[str, str] = {}
    tied = {name: tie for tie in menu.ties for name in tie}
    for name, names in menu.codecs.items():
        group = tied.get(name, [name])
        if names and name not in plan:
            sizes = {codec: kind.size(checkpoint, plan | dict.fromkeys(group, codec)) for codec in names}
            plan |= dict.fromkeys(group, min(sizes, key=sizes.__getitem__))
    smallest = kind.size(checkpoint, plan)
    check(case, tmp_path, Budget(size=smallest))
    with pytest.raises(BudgetError, match=f"smallest {kind.name} file.*{smallest} bytes.*--size {smallest}"):
        check(case, tmp_path, Budget(size=smallest - 1))


def test_too_few_bits_are_refused_with_the_least(case: Case, tmp_path: Path) -> None:
    """Independent: the bytes of each block matrix's smallest codec, or its bfloat16, over its weights; headers are 1 %."""
    _, _, menu, shapes = case
    inner = {name: shape for name, shape in shapes.items() if name not in TABLES}
    nbytes = sum(min((codecs.get(codec).nbytes(shape) for codec in menu.codecs[name]), default=2 * shape[0] * shape[1])
                 for name, shape in inner.items())
    least = 8 * nbytes / sum(rows * columns for rows, columns in inner.values())
    check(case, tmp_path, Budget(bits=least * 1.01))
    with pytest.raises(BudgetError, match=r"the least to be had is .*--bits"):
        check(case, tmp_path, Budget(bits=least * 0.99))


def test_too_little_memory(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = check(case, tmp_path).memory
    for free, limit in ((wanted - 1, 2**50), (2**50, wanted - 1)):  # the machine's, or the container's
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free, total=2**50))
        monkeypatch.setattr(module, "memory_limit", lambda limit=limit: limit)
        with pytest.raises(SupremumError, match=r"needs about .* of memory, .* is free.*--tokens"):
            check(case, tmp_path)
    monkeypatch.setattr(module, "memory_limit", lambda: wanted)
    assert check(case, tmp_path).memory == wanted


def test_too_little_disk(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, asked = check(case, tmp_path).disk, []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=wanted - 1000)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    with pytest.raises(SupremumError, match=r"needs about .* of disk, .* is free.*another --out") as refused:
        check(case, tmp_path)
    assert asked == [tmp_path.resolve()] and str(tmp_path) in refused.value.cause
    state = tmp_path / "out.work" / "hidden"  # an interrupted run's own files are not missing twice
    state.mkdir(parents=True)
    (state / "0000.safetensors").write_bytes(b"x" * 1000)
    assert check(case, tmp_path).disk == wanted


def test_no_format_for_any_layer(case: Case, tmp_path: Path) -> None:
    checkpoint, kind, _, shapes = case
    nothing = menu_of(kind, checkpoint, shapes, [""])  # --keep everything
    with pytest.raises(SupremumError, match=f"{kind.name} target has no format for any of its layers.*--target") as refused:
        check(case, tmp_path, menu=nothing)
    assert checkpoint.source in refused.value.cause
