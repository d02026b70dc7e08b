"""GPTQ folders of other makers: version 1 and 2, asymmetric zero points, activation order; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from supremum.checkpoint import open_checkpoint
from supremum.errors import CheckpointError

from ..codecs.test_gptq import unpacked

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DOWN = "model.layers.0.mlp.down_proj."
Tensors = dict[str, torch.Tensor]


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """(N, M) numbers -> (ceil(N b / 32), M) words: a column's, one after the other, the first one lowest."""
    words = -(-len(numbers) * bits // 32)
    streams = [sum(int(n) << (bits * place) for place, n in enumerate(column)) for column in numbers.T]
    found = [[(stream >> (32 * word)) & 0xFFFFFFFF for stream in streams] for word in range(words)]
    return np.array(found, dtype=np.uint32).view(np.int32)


def foreign(source: Path, folder: Path, bits: int, group: int, *, version: int = 1, least_zero: int = 1,
            ordered: bool = False) -> Tensors:
    """Every linear layer as random codes with asymmetric zero points; returns what each must decode to."""
    shutil.copytree(source, folder)
    draw = np.random.default_rng(0)
    tensors, expected = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not any(f".{target}.weight" in name for target in TARGETS):
            tensors[name] = value
            continue
        rows, columns = value.shape
        codes_IO = draw.integers(1 << bits, size=(columns, rows))
        zeros_GO = draw.integers(least_zero, 1 << bits, size=(columns // group, rows))
        scales_GO = torch.from_numpy(draw.uniform(0.001, 0.02, size=zeros_GO.shape)).half()
        order = (draw.permutation(columns) if ordered else np.arange(columns)) // group
        words = packed(zeros_GO.T - (version == 1 and least_zero > 0), bits).T
        base = name.removesuffix("weight")
        tensors |= {base + "qweight": torch.from_numpy(packed(codes_IO, bits)), base + "scales": scales_GO,
                    base + "qzeros": torch.from_numpy(words.copy()), base + "g_idx": torch.from_numpy(order.astype(np.int32))}
        expected[name] = torch.from_numpy(((codes_IO - zeros_GO[order]) * scales_GO.double().numpy()[order]).T).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered,
                                     "sym": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize(("bits", "version", "ordered"), [
    (4, 1, True), (4, 2, True), (2, 1, False), (3, 1, True), (3, 2, False), (8, 1, False), (8, 2, True),
])  # fmt: skip
def test_decoding(tiny_model: Callable[..., Path], tmp_path: Path, bits: int, version: int, ordered: bool) -> None:
    expected = foreign(tiny_model("llama", "bfloat16"), tmp_path / "m", bits, 32, version=version, ordered=ordered,
                       least_zero=1 if version == 1 else 0)  # fmt: skip
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.format == "gptq"
    for name, value in expected.items():
        assert checkpoint.tensors[name].kind == f"gptq{bits}-g32" and torch.equal(checkpoint.read(name), value)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_none_borrows_from_its_neighbour(tiny_model: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    """GPTQModel takes 1 off each number with one subtraction a word; adding it back the same way gives all of them."""
    expected = foreign(tiny_model("llama", "bfloat16"), tmp_path / "m", bits, 32, least_zero=0)
    tensors = load_file(tmp_path / "m/model.safetensors")
    ones = np.int32(int(packed(np.ones((32 // bits, 1), int), bits)[0, 0]))
    for name in tensors:
        if name.endswith("qzeros"):
            with np.errstate(over="ignore"):
                tensors[name] = torch.from_numpy(tensors[name].numpy() - ones)
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())


def test_three_bits_wrap_round_one_by_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    foreign(tiny_model("llama", "bfloat16"), tmp_path / "m", 3, 32)
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors[DOWN + "qzeros"] = torch.full_like(tensors[DOWN + "qzeros"], -1)  # every field 7, every zero point 0
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    parts = {key: tensors[DOWN + key] for key in ("qweight", "qzeros", "scales", "g_idx")}
    read = open_checkpoint(tmp_path / "m").read(DOWN + "weight")
    assert np.array_equal(read.double().numpy(), unpacked(parts, 3)) and (read >= 0).all()


def test_without_a_group_index_groups_are_even(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    expected = foreign(tiny_model("llama", "bfloat16"), tmp_path / "m", 4, 64)
    tensors = {n: t for n, t in load_file(tmp_path / "m/model.safetensors").items() if not n.endswith("g_idx")}
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name != DOWN + part}


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scales": (lambda t: without(t, "scales"), "lacks"),
    "no codes": (lambda t: without(t, "qweight"), "lacks"),
    "floats too": (lambda t: t | {DOWN + "weight": torch.zeros(64, 256)}, "floats too"),
    "codes as floats": (lambda t: t | {DOWN + "qweight": torch.zeros(32, 64)}, "codes of type F32"),
    "other outputs": (lambda t: t | {DOWN + "scales": torch.ones(8, 63).half()}, "do not belong"),
    "other width": (lambda t: t | {DOWN + "qzeros": torch.zeros(8, 4, dtype=torch.int32)}, "for 512 inputs"),
    "short order": (lambda t: t | {DOWN + "g_idx": torch.zeros(255, dtype=torch.int32)}, "group index"),
    "group outside": (lambda t: t | {DOWN + "g_idx": torch.full((256,), 8, dtype=torch.int32)}, "outside its groups"),
    "infinite scale": (lambda t: t | {DOWN + "scales": torch.full((8, 64), torch.inf).half()}, "NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    foreign(tiny_model("llama", "bfloat16"), tmp_path / "m", 4, 32)
    edit, message = TENSORS[case]
    save_file(edit(load_file(tmp_path / "m/model.safetensors")), tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(tmp_path / "m")
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert caught.value.remedy


@pytest.mark.parametrize(("change", "message"), [
    ({"checkpoint_format": "marlin"}, "marlin"), ({"pack_dtype": "int16"}, "packed in int16"), ({"bits": 8}, "says 8 bits"),
])  # fmt: skip
def test_schemes_that_are_refused(tiny_model: Callable[..., Path], tmp_path: Path, change: dict[str, Any],
                                  message: str) -> None:
    foreign(tiny_model("llama", "bfloat16"), tmp_path / "m", 4, 32)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m")


def test_transposed_layers_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("gpt2"), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transpose"):
        open_checkpoint(tmp_path / "m")
