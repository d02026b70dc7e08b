"""GPTQ folders as they are written: the layout by an unpacker of its description, the rules of mixed plans, the proof."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import target
from supremum.checkpoint.write_gptq import quantization_config
from supremum.errors import CheckpointError, SupremumError
from supremum.runtime.verify import verify
from supremum.solve import nearest

from ..codecs.test_gptq import unpacked
from .test_write_compressed_tensors import compress, total

GPTQ = target("gptq")


def plan_for(checkpoint: Any, codec: str) -> dict[str, str]:
    return {n: codec for n, info in checkpoint.tensors.items() if codec in GPTQ.codecs(checkpoint, n, tuple(info.shape))}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("family", "codec"), [
    ("llama", "gptq4-g64"), ("llama", "gptq3-g32"), ("mistral", "gptq8-channel"), ("qwen2", "gptq2-g32"),
    ("phi3", "gptq4-g32"),
])  # fmt: skip
def test_the_folder_is_as_described_and_opens(family, codec, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    plan = plan_for(checkpoint, codec)
    coded = compress(checkpoint, plan)
    folder = GPTQ.write(checkpoint, coded, tmp_path / "out")
    assert total(folder) == GPTQ.size(checkpoint, plan)
    settings = config_of(folder)
    group = codecs.get(codec).step or -1
    assert (settings["quant_method"], settings["checkpoint_format"], settings["bits"], settings["group_size"]) == (
        "gptq", "gptq", int(codec[4]), group)  # fmt: skip
    assert settings["sym"] is True and settings["desc_act"] is False and "dynamic" not in settings
    assert json.loads((folder / "quantize_config.json").read_text()) == settings
    stored, opened = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    assert opened.format == "gptq"
    for name, value in coded.items():
        parts = {key: stored[name.removesuffix("weight") + key] for key in ("qweight", "qzeros", "scales", "g_idx")}
        assert torch.equal(opened.read(name), value.decode())
        assert np.array_equal(unpacked(parts, settings["bits"]), value.decode().double().numpy())
        assert opened.tensors[name].nbytes == value.nbytes
    for name in checkpoint.tensors.keys() - plan.keys():
        assert torch.equal(opened.read(name), checkpoint.read(name))


def test_mixed_plans_have_rules_that_fused_layers_match(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    plan = plan_for(checkpoint, "gptq4-g64")
    plan |= {name: "gptq8-g32" for name in plan if "layers.0.self_attn" in name}
    plan = {name: codec for name, codec in plan.items() if "layers.1.mlp" not in name}
    coded = compress(checkpoint, plan)
    folder = GPTQ.write(checkpoint, coded, tmp_path / "out")
    opened, settings = open_checkpoint(folder), config_of(folder)
    assert all(torch.equal(opened.read(name), value.decode()) for name, value in coded.items())

    def found(module: str) -> Any:
        """As GPTQModel and vLLM look it up: the first rule that matches from the start."""
        for rule, change in settings["dynamic"].items():
            if re.match(rule[2:], module):
                return None if rule.startswith("-:") else (change["bits"], change["group_size"])
        return settings["bits"], settings["group_size"]

    for name in plan_for(checkpoint, "gptq4-g64"):
        codec = codecs.get(plan[name]) if name in plan else None
        assert found(name.removesuffix(".weight")) == ((codec.bits, codec.step) if codec else None), name
    assert found("model.layers.0.self_attn.qkv_proj") == (8, 32) and found("model.layers.1.self_attn.qkv_proj") == (4, 64)
    assert found("model.layers.1.mlp.gate_up_proj") is None and found("model.layers.0.mlp.gate_up_proj") == (4, 64)
    assert found("model.layers.10.self_attn.q_proj") == (4, 64)  # no rule is a prefix of another layer's name


def test_layers_that_are_fused_but_differ_have_rules_of_their_own():
    linears = ["b.0.a.k_proj", "b.0.a.q_proj", "b.0.a.v_proj"]
    settings = quantization_config(linears, {"b.0.a.q_proj.weight": "gptq4-g32", "b.0.a.k_proj.weight": "gptq4-g32"})
    assert settings["dynamic"] == {r"-:^b\.0\.a\.(v_proj)$": {}}


def test_which_codecs(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    assert GPTQ.codecs(checkpoint, "lm_head.weight", (384, 64)) == []
    name = "model.layers.0.mlp.up_proj.weight"
    assert GPTQ.codecs(checkpoint, name, (256, 64)) == sorted(f"gptq{b}-{g}" for b in (2, 3, 4, 8)
                                                              for g in ("g32", "g64", "channel"))  # fmt: skip
    assert GPTQ.codecs(checkpoint, name, (250, 64)) == []  # zero points are packed along the outputs
    for family in ("gpt2", "bert"):
        with pytest.raises(CheckpointError, match="is not a decoder"):
            GPTQ.codecs(open_checkpoint(tiny_model(family)), "x.weight", (64, 64))
    with pytest.raises(CheckpointError, match="not a codec of GPTQ"):
        GPTQ.size(checkpoint, {name: "int4-g64"})


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_without_gptqmodel_nothing_is_called_proved(tiny_model, tmp_path, capsys):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    folder = GPTQ.write(checkpoint, compress(checkpoint, plan_for(checkpoint, "gptq4-g64")), tmp_path / "out")
    proof = verify(folder, GPTQ)
    assert not proof.passed and proof.positions == 0 and proof.kl_mean is None and proof.version == ""
    assert "install gptqmodel" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_gptqmodel_answers_as_we_decode(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    plan = plan_for(checkpoint, "gptq4-g64") | {"model.layers.0.mlp.down_proj.weight": "gptq3-g32"}
    coded = compress(checkpoint, plan)
    sound = GPTQ.write(checkpoint, coded, tmp_path / "sound")
    proof = verify(sound, GPTQ, threads=1)
    assert proof.passed and proof.kl_mean < 1e-9 and proof.relative_error < 1e-4
    name = "model.layers.1.mlp.down_proj.weight"
    coded[name] = nearest(checkpoint.read(name).float() * 1.2, codecs.get("gptq4-g64"))
    with pytest.raises(SupremumError, match="answers differently"):
        verify(GPTQ.write(checkpoint, coded, tmp_path / "wrong"), GPTQ, open_checkpoint(sound), threads=1)
