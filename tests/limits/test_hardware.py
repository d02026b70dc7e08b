"""Measurements give plausible positive numbers; nothing here asserts a speed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from supremum.limits import hardware, topology
from supremum.limits.hardware import Machine, Peak, Read
from supremum.limits.topology import KIB, MIB, Cache


def machine(**changes: object) -> Machine:
    facts: dict[str, object] = {
        "device": "cpu", "name": "test", "cores": 2, "memory_bytes": 10**9,
        "caches": (Cache(2, MIB, 1, "measured"), Cache(3, 16 * MIB, 2, "measured")),
        "reads": (Read("L2", MIB, 1, 90.0, 100.0),
                  Read("L3", 4 * MIB, 1, 30.0, 40.0), Read("memory", 64 * MIB, 1, 8.0, 10)),
        "peaks": (Peak("float32", 1, 90, 100), Peak("int8", 1, 300, 400), Peak("float32", 2, 150, 200)),
    }
    return Machine(**{**facts, **changes})  # type: ignore[arg-type]


def test_a_small_measurement_is_complete_and_restores_torch():
    before = torch.get_num_threads()
    found = hardware.measure(working_sets=[64 * KIB, 256 * KIB], threads=[1, 2], size=64, seconds=0.005)
    assert torch.get_num_threads() == before
    assert {(r.working_set, r.threads) for r in found.reads} == {(s * KIB, t) for s in (64, 256) for t in (1, 2)}
    assert all(0 < r.gb_s <= r.best_gb_s for r in found.reads)
    assert all(0 < p.gflop_s <= p.best_gflop_s for p in found.peaks)
    assert {"float32", "bfloat16"} <= {p.dtype for p in found.peaks}
    assert found.cores >= 1 and found.memory_bytes > 2**26 and found.caches


def test_reading_really_reads():
    """A sum over a vector of distinct values sees every one of them, in every pass."""
    row = torch.arange(1000, dtype=torch.float32).expand(7, 1000)
    assert row.sum(1).tolist() == [499500.0] * 7


def test_bandwidth_lies_between_its_neighbours_and_holds_at_the_ends():
    m = machine()
    assert m.bandwidth(1) == m.bandwidth(MIB) == 100e9
    assert m.bandwidth(2 * MIB) == pytest.approx(70e9)
    assert m.bandwidth(10**12) == 10e9
    assert m.peak(("float32",)) == 200e9 and m.peak(("float32", "int8"), threads=1) == 400e9
    assert m.peak(("bfloat16",)) == 0
    with pytest.raises(ValueError, match="3 threads"):
        m.bandwidth(1, threads=3)


def test_home_counts_private_caches_once_a_core():
    m = machine()
    assert [m.home(n) for n in (MIB, 2 * MIB, 3 * MIB, 16 * MIB, 17 * MIB)] == ["L2", "L2", "L3", "L3", "memory"]
    assert topology.home(2 * MIB, m.caches, 1) == "L3"


def test_caches_are_read_from_the_system_and_assumed_without_it(tmp_path):
    for index, (level, kind, size, shared) in enumerate(
        [(1, "Data", "32K", "0"), (1, "Instruction", "32K", "0"), (2, "Unified", "2048K", "0,4"),
         (3, "Unified", "105M", "0-3,4-7")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")
    assert topology.caches(tmp_path) == (Cache(2, 2 * MIB, 2, "measured"), Cache(3, 105 * MIB, 8, "measured"))
    (tmp_path / "index3" / "size").write_text("?")
    assert [c.level for c in topology.caches(tmp_path)] == [2]


def test_caches_without_a_system_are_estimates(tmp_path, monkeypatch):
    monkeypatch.setattr(topology.sys, "platform", "win32")
    assert {c.kind for c in topology.caches(tmp_path)} == {"estimate"}


def test_a_control_group_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1048576\n")
    assert topology.memory_limit(tmp_path) == 1048576
    (tmp_path / "memory.max").write_text("max\n")
    assert topology.memory_limit(tmp_path) > 2**26


def test_a_failing_worker_raises_instead_of_hanging():
    def broken() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        hardware._together([broken, lambda: None], 0.01)


def test_a_graphics_card_is_measured_by_the_same_loops(monkeypatch):
    """On the meta device every kernel is a shape: the path is walked, its synchronisation counted."""
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    facts = SimpleNamespace(name="card", L2_cache_size=50 * MIB, total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert all(rate > 0 for rate in hardware.read_rate(MIB, seconds=0.001, device="meta"))
    assert hardware.matmul_rate("bfloat16", size=8, seconds=0.001, device="meta")
    assert len(waits) >= 10
    monkeypatch.setattr(hardware, "read_rate", lambda nbytes, **_: (1e9 + nbytes, 2e9 + nbytes))
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype, **_: None if dtype == "int8" else (1e12, 2e12))
    found = hardware.measure("cuda")
    assert found.name == "card" and [r.where for r in found.reads] == ["L2", "memory", "memory"]
    assert [p.dtype for p in found.peaks] == ["float32", "bfloat16", "float16"]
    assert found.memory_bytes == 8 * 2**30
