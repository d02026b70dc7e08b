"""bench/stages.py: one more stage a row, each by the product's own functions."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from supremum.checkpoint import open_checkpoint
from supremum.gather import gather, gather_fisher
from supremum.stats.sweep import moments
from supremum.workspace import Workspace

FILE = Path(__file__).parents[2] / "bench/stages.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_stages", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_stages"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "notes.txt"
    path.write_text("\n\n".join(f"The river carries {i} stones past the bridge at {i % 24} o'clock." for i in range(3000)))
    return path


def test_every_stage_has_its_row(bench: Any, tiny_model: Any, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([str(tiny_model("llama")), str(text), str(text), "--only", "int3-g64", "--tokens", "2048", "--windows", "4",
                "--dtype", "float32", "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    rows = {row["stage"]: row for row in found["stages"]}
    assert list(rows) == ["nearest", "+ cancellation", "+ token weights", "+ descent", "+ drift", "+ gains"]
    assert rows["+ cancellation"]["test_kl"] < 0.9 * rows["nearest"]["test_kl"]
    assert rows["+ gains"]["held_out_kl"] < rows["+ drift"]["held_out_kl"] < rows["nearest"]["held_out_kl"]
    assert rows["+ token weights"]["cpu_seconds"] > found["forward_seconds"] + found["backward_seconds"]
    for before, row in zip(found["stages"], found["stages"][1:], strict=False):
        assert row["more_seconds"] == pytest.approx(row["cpu_seconds"] - before["cpu_seconds"])
        if row["bought"] is not None:
            assert row["bought"] * row["more_seconds"] / 60 == pytest.approx(before["test_kl"] - row["test_kl"])
    assert all(f"| {stage} |" in said.err for stage in rows)


def test_equal_weights_give_the_moments_of_the_sweep(bench: Any, tiny_model: Any, text: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = gather(open_checkpoint(tiny_model("llama")), Workspace(tmp_path / "work", {}), text=[str(text)], tokens=1024,
                      seed=0, dtype="float32")
    gather_fisher(gathered, 0)
    sums, keys = moments(gathered.workspace, gathered.calls, gathered.calls[1].block)
    other = bench.weighted(gathered, 1, keys)
    assert set(other) == set(sums) and all((other[key] - sums[key]).norm() > 0.01 * sums[key].norm() for key in sums)
    joint = bench.joint_weights
    monkeypatch.setattr(bench, "joint_weights", lambda scores: joint([score.new_ones(score.shape) for score in scores]))
    for key, found in bench.weighted(gathered, 1, keys).items():
        assert (found - sums[key]).norm() < 1e-5 * sums[key].norm()
