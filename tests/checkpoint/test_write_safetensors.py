"""Our files are, byte for byte, those of the safetensors library."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from supremum.checkpoint.write_safetensors import SafetensorsWriter, Spec, measure

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a.weight_shape": torch.tensor([2, 3]),
    "a.weight_packed": torch.arange(5, dtype=torch.int32).view(5, 1),
    "norm": torch.ones(7),
    "flags": torch.arange(3, dtype=torch.uint8),
}


def specs() -> list[Spec]:
    return [Spec(name, value.dtype, tuple(value.shape)) for name, value in TENSORS.items()]


def test_same_bytes_as_the_library(tmp_path):
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, specs()) as out:
        for name in reversed(list(TENSORS)):  # any order of writing
            out.put(name, TENSORS[name])
    assert path.read_bytes() == save(TENSORS, {"format": "pt"})
    assert path.stat().st_size == measure(specs())


def test_whole_or_absent(tmp_path):
    with pytest.raises(AssertionError, match="not written"), SafetensorsWriter(tmp_path / "x", specs()) as out:
        out.put("norm", TENSORS["norm"])
    with pytest.raises(AssertionError), SafetensorsWriter(tmp_path / "x", specs()) as out:
        out.put("norm", TENSORS["norm"].double())
    assert list(tmp_path.iterdir()) == []
