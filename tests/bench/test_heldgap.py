"""bench/heldgap.py: both sides of one archive, each from its own windows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "bench/heldgap.py"


def test_the_sides_differ_in_their_windows_alone(tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_heldgap", FILE)
    assert spec is not None and spec.loader is not None
    bench = sys.modules["bench_heldgap"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"The river carries {i * i} stones past bridge {i * 7919 % 10007}." for i in range(6000)))
    bench.main([str(tiny_model("llama", "bfloat16", hidden_size=128)), str(text), "--bits", "3", "--tokens", "2048",
                "--dtype", "float32", "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    calibration, held_out = found["sides"]
    assert [side["windows"] for side in (calibration, held_out)] == ["calibration", "held-out"]
    assert calibration["bits"] == held_out["bits"] and 2.9 < calibration["bits"] <= 3.0 + 1e-9
    for side in (calibration, held_out):
        assert side["gap"] == pytest.approx(side["bits"] - side["least_bits"])
    assert calibration["kl"] != held_out["kl"] and calibration["layers_gap"] < held_out["layers_gap"]  # S was fitted
    assert found["gap_difference"] == pytest.approx(held_out["gap"] - calibration["gap"])
    assert "| difference |" in said.err
    one, other = found["mixed_layers_gap"].values()
    assert calibration["layers_gap"] < min(one, other) and max(one, other) < held_out["layers_gap"] + 0.05
