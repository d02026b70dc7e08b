"""Archives as int8: the archive's values to the bit, for us and for the reader that the documentation shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from supremum import Budget, optimize
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import target
from supremum.codecs.lattice import Lattice
from supremum.errors import CheckpointError, SupremumError
from supremum.output import convert

from .test_archive import ARCHIVE, lattices

INT8 = target("int8")
NAME = "model.layers.0.mlp.down_proj.weight"
EXTREMES = (124, -124, 128, -128, 300, -32764)  # multiples of 4, and zeros behind them: the trellis stays where it begins


@pytest.fixture
def archive(tiny_model, tmp_path) -> Path:
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    coded = lattices(checkpoint)
    integers_OI = coded[NAME].integers_OI.clone()
    integers_OI[0] = 0
    integers_OI[0, :len(EXTREMES)] = torch.tensor(EXTREMES, dtype=torch.int16)
    return ARCHIVE.write(checkpoint, coded | {NAME: Lattice(integers_OI, coded[NAME].frame)}, tmp_path / "archive")


def snippet() -> str:
    """The reader in docs/limits.md."""
    text = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    return next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ".integers" in code)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_documented_reader_gives_the_archive_to_the_bit(family, tiny_model, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    archive = ARCHIVE.write(checkpoint, lattices(checkpoint), tmp_path / "archive")
    convert(archive, "int8", tmp_path / "integers")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(snippet(), found)
    expected = open_checkpoint(archive)
    assert found["weights"].keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found["weights"][name], expected.read(name)), name


def test_integers_beyond_a_byte_are_exact_and_said(archive, tmp_path, capsys):
    convert(archive, "int8", tmp_path / "out")
    assert "4 integers in 1 of 16 matrices" in capsys.readouterr().err
    before, after = open_checkpoint(archive), open_checkpoint(tmp_path / "out")
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.tensors)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored[f"{NAME}.overflow"].tolist() == [128, -128, 300, -32764]
    assert stored[f"{NAME}.overflow_at"].tolist() == [2, 3, 4, 5]
    assert stored[f"{NAME}.integers"].dtype == torch.int8 and not any(
        name.endswith("overflow") and NAME not in name for name in stored)  # fmt: skip
    assert after.tensors[NAME].kind == "int8"
    assert json.loads((tmp_path / "out/converted.json").read_text())["proof"]["passed"]


def test_only_archives_have_integers(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="no archive's integers"):
        convert(tiny_model("llama"), "int8", tmp_path / "out")
    with pytest.raises(SupremumError, match="for `supremum convert` alone"):
        optimize(tiny_model("llama"), Budget(bits=4), target="int8", out=tmp_path / "out", text=[__file__], tokens=2048)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [
    {"row_scale": torch.ones(65)}, {"integers": torch.zeros(64, 256)}, {"overflow_at": torch.tensor([0, 1])},
    {"overflow_at": torch.tensor([0, 1, 2, 64 * 256])}, {"overflow": torch.zeros(0, dtype=torch.int16)},
])  # fmt: skip
def test_damage_is_refused(archive, tmp_path, change):
    convert(archive, "int8", tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors |= {f"{NAME}.{part}": value for part, value in change.items()}
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"belong together|outside its matrix"):
        open_checkpoint(tmp_path / "out").read(NAME)


def test_another_version_is_refused(archive, tmp_path):
    convert(archive, "int8", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version '2'"):
        open_checkpoint(tmp_path / "out")


def test_a_wrong_byte_is_not_called_exact(archive, tmp_path, monkeypatch):
    from supremum.checkpoint import int8

    sound = int8.parts_of
    monkeypatch.setattr(int8, "parts_of", lambda matrix: sound(matrix) | {"row_scale": sound(matrix)["row_scale"] * 2})
    with pytest.raises(CheckpointError, match="not what was written"):
        convert(archive, "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
