"""compressed-tensors folders: equal to the library's own decoding and to stock Transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from supremum.checkpoint import open_checkpoint
from supremum.errors import CheckpointError
from tests.checkpoint.test_hf import outputs

DOWN = "model.layers.0.mlp.down_proj.weight"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


Tensors = dict[str, torch.Tensor]


def compress(source: Path, folder: Path, bits: int, group: int | None, symmetric: bool = True) -> Tensors:
    """Round every linear layer to nearest, store it with the library's packing; returns what each must decode to."""
    shutil.copytree(source, folder)
    tensors, expected = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not any(f".{t}.weight" in name for t in TARGETS):
            tensors[name] = value
            continue
        rows, columns = value.shape
        groups = 1 if group is None else columns // group
        blocks = value.float().view(rows, groups, -1)
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        if symmetric:
            scale, zero = (blocks.abs().amax(-1) / -low).bfloat16(), torch.zeros(rows, groups, dtype=torch.int8)
        else:
            scale = ((blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)) / (high - low)).bfloat16()
            zero = (low - blocks.amin(-1).clamp(max=0) / scale.float()).round().clamp(low, high).to(torch.int8)
        codes = (blocks / scale.float()[..., None] + zero[..., None]).round().clamp(low, high).to(torch.int8)
        base = name.removesuffix("weight")
        tensors[base + "weight_packed"] = pack_to_int32(codes.view(rows, columns), bits)
        tensors[base + "weight_scale"] = scale
        tensors[base + "weight_shape"] = torch.tensor([rows, columns])
        if not symmetric:
            tensors[base + "weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
        expected[name] = ((codes.float() - zero.float()[..., None]) * scale.float()[..., None]).view(rows, columns)
        if not symmetric:  # multiplied in the scales' type
            expected[name] = expected[name].bfloat16().float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": weights | ({"group_size": group} if group else {})}}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (None, True), (64, False)])
def test_decoding(
    tiny_model: Callable[..., Path], tmp_path: Path, bits: int, group: int | None, symmetric: bool
) -> None:
    expected = compress(tiny_model("llama", "bfloat16"), tmp_path / "m", bits, group, symmetric)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.format == "compressed-tensors"
    for name, value in expected.items():
        info = checkpoint.tensors[name]
        assert info.kind == f"{'' if symmetric else 'u'}int{bits}-{f'g{group}' if group else 'channel'}"
        read = checkpoint.read(name)
        assert read.dtype == torch.float32 and torch.equal(read, value)
    rows, columns = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].shape
    groups = columns // group if group else 1
    packed = rows * columns * bits // 8 + rows * groups * 2 + 16 + (0 if symmetric else rows * bits // 8 * groups)
    assert checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].nbytes == packed


@pytest.mark.parametrize("bits", [3, 4])
def test_model_equals_stock_transformers(tiny_model: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    compress(tiny_model("qwen2", "bfloat16"), tmp_path / "m", bits, 32)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).eval()
    assert torch.equal(outputs(open_checkpoint(tmp_path / "m").model(torch.bfloat16)), outputs(stock))


def test_unpacked_bytes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The int-quantized format: int8 codes as they are."""
    expected = compress(tiny_model("llama", "bfloat16"), tmp_path / "m", 8, None)
    tensors = load_file(tmp_path / "m/model.safetensors")
    for name in expected:
        base = name.removesuffix("weight")
        scale = tensors[base + "weight_scale"].float()
        tensors[name] = (expected[name] / scale).round().to(torch.int8)
        del tensors[base + "weight_packed"], tensors[base + "weight_shape"]
    save_file(tensors, tmp_path / "m/model.safetensors")
    edit_config(tmp_path / "m", lambda q: q.update(format="int-quantized"))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())


def test_activation_order(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    expected = compress(tiny_model("llama", "bfloat16"), tmp_path / "m", 4, 32)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(tmp_path / "m/model.safetensors")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 32
    tensors[name + "_g_idx"] = order.int()
    save_file(tensors, tmp_path / "m/model.safetensors")
    scale = tensors[name + "_scale"].float()
    codes = expected[name] / scale.repeat_interleave(32, 1)
    assert torch.allclose(open_checkpoint(tmp_path / "m").read(name), codes * scale[:, order])


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def drop(tensors: Tensors, ending: str) -> Tensors:
    name = next(n for n in tensors if n.endswith(ending))
    return {n: t for n, t in tensors.items() if n != name}


def swap(tensors: Tensors, ending: str, value: torch.Tensor) -> Tensors:
    return drop(tensors, ending) | {next(n for n in tensors if n.endswith(ending)): value}


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "method": (lambda q: q.update(quant_method="awq"), "already .awq"),
    "format": (lambda q: q.update(format="marlin-24"), "marlin"),
    "bits": (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3), "declares no weights of int4-g32"),
    "floats": (lambda q: q["config_groups"]["group_0"]["weights"].update(type="float", num_bits=5), "of a kind"),
    "activations": (lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "activations"),
    "groups": (lambda q: q.update(config_groups=[]), "config_groups"),
    "cache": (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "rotation": (lambda q: q.update(transform_config={"config_groups": {}}), "transform_config"),
    "sparsity": (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
}  # fmt: skip
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scales": (lambda t: drop(t, "weight_scale"), "lacks"),
    "no shape": (lambda t: drop(t, "weight_shape"), "lacks its shape"),
    "no codes": (lambda t: drop(t, "weight_packed"), "lacks"),
    "other shape": (lambda t: swap(t, "mlp.down_proj.weight_shape", torch.tensor([64, 9999])), "not its shape"),
    "negative shape": (lambda t: swap(t, "mlp.down_proj.weight_shape", torch.tensor([-64, 256])), "not its shape"),
    "codes as floats": (lambda t: swap(t, "mlp.down_proj.weight_packed", torch.zeros(64, 32)), "codes of type F32"),
    "too few scales": (lambda t: swap(t, "mlp.down_proj.weight_scale", torch.ones(63, 8)), "has scales"),
    "uneven groups": (lambda t: swap(t, "mlp.down_proj.weight_scale", torch.ones(64, 7)), "has scales"),
    "zero points": (lambda t: t | {f"{DOWN}_zero_point": torch.zeros(8, 7, dtype=torch.int32)},
                    "zero points"),
    "groups outside": (lambda t: t | {f"{DOWN}_g_idx": torch.full((256,), 8)}, "group index"),
    "infinite scale": (lambda t: swap(t, "mlp.down_proj.weight_scale", torch.full((64, 8), torch.inf)), "NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_schemes_that_are_refused(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    compress(tiny_model("llama", "bfloat16"), tmp_path / "m", 4, 32)
    edit, message = CONFIGS[case]
    edit_config(tmp_path / "m", edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    compress(tiny_model("llama", "bfloat16"), tmp_path / "m", 4, 32)
    edit, message = TENSORS[case]
    save_file(edit(load_file(tmp_path / "m/model.safetensors")), tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(tmp_path / "m")
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert "model.safetensors" in caught.value.cause and caught.value.remedy
