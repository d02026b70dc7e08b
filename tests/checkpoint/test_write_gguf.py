"""GGUF files against the `gguf` library, Transformers' own GGUF loader and Transformers' rotary embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.gguf_metadata import rope_tensors
from supremum.checkpoint.targets import LazyCoded, names, target
from supremum.checkpoint.write_gguf import FILE
from supremum.errors import CheckpointError, SupremumError
from supremum.solve import nearest

from ..conftest import DECODERS

GGUF = target("gguf")
PROMPT = [5, 9, 200, 31, 77, 120, 8, 300, 45, 6]


def conv1d(checkpoint, name: str) -> bool:
    return isinstance(checkpoint.skeleton().get_submodule(name.removesuffix(".weight")), Conv1D)


def matrix(checkpoint, name: str) -> torch.Tensor:
    """The weight as (O, I) float32, whatever the module."""
    value = checkpoint.read(name).float()
    return value.T.contiguous() if conv1d(checkpoint, name) else value


def plan_for(checkpoint, wanted: str) -> dict[str, str]:
    plan = {}
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and wanted in GGUF.codecs(checkpoint, name, tuple(matrix(checkpoint, name).shape)):
            plan[name] = wanted
    return plan


def compress(checkpoint, plan: dict[str, str]) -> dict[str, codecs.Coded]:
    return {name: nearest(matrix(checkpoint, name), codecs.get(codec)) for name, codec in plan.items()}


@pytest.mark.parametrize("family", DECODERS)
def test_transformers_loads_what_we_wrote(family, tiny_model, tmp_path):
    """Transformers' GGUF loader has its own names, permutations and dequantisers; its gaps in the config are filled."""
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    plan = plan_for(checkpoint, "Q8_0")
    coded = compress(checkpoint, plan)
    path = GGUF.write(checkpoint, coded, tmp_path)
    assert path.stat().st_size == GGUF.size(checkpoint, plan)
    assert plan, "nothing was compressed"
    expected = checkpoint.model(torch.float32)
    with torch.no_grad():
        for name, value in coded.items():
            expected.get_parameter(name).copy_(value.decode().T if conv1d(checkpoint, name) else value.decode())
    config = open_checkpoint(path).config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, config=config, dtype=torch.float32)
    with torch.inference_mode():
        tokens = torch.tensor([PROMPT])
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", ["Q4_0", "Q5_1", "IQ4_NL", "MXFP4", "Q4_K", "Q6_K"])
def test_blocks_and_size(codec, tiny_model, tmp_path):
    """Rows in the file decode, by the gguf library, to our decoding; the size was known before."""
    settings = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 389}  # 389 rows need padding to 32 bytes
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16", **settings))
    plan = plan_for(checkpoint, codec)
    assert "model.embed_tokens.weight" in plan and "lm_head.weight" in plan
    coded = compress(checkpoint, plan)
    path = GGUF.write(checkpoint, coded, tmp_path)
    assert path.stat().st_size == GGUF.size(checkpoint, plan)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for place, name in (("output", "lm_head"), ("blk.1.ffn_down", "model.layers.1.mlp.down_proj")):
        stored = tensors[f"{place}.weight"]
        assert stored.tensor_type.name == codec
        ours = coded[f"{name}.weight"].decode().numpy()
        np.testing.assert_array_equal(dequantize(stored.data, stored.tensor_type), ours)
    heads, size = 8, 32
    rows = dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
    halves = coded["model.layers.0.self_attn.q_proj.weight"].decode().view(heads, 2, size // 2, -1)
    pairs = torch.stack([halves[:, 0], halves[:, 1]], dim=2)  # (i, i + D/2) -> neighbours
    np.testing.assert_array_equal(rows, pairs.reshape(rows.shape).numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_conversion_keeps_every_bit(dtype, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("qwen3", dtype))
    again = open_checkpoint(GGUF.write(checkpoint, {}, tmp_path))
    assert again.tensors.keys() == checkpoint.tensors.keys()
    for name, info in checkpoint.tensors.items():
        assert torch.equal(again.read(name).float(), checkpoint.read(name).float()), name
        assert again.tensors[name].kind == (info.kind if len(info.shape) > 1 else "F32")


def test_from_gguf_untouched_tensors_and_keys_are_copied(tiny_model, tmp_path):
    first = open_checkpoint(tiny_model("llama", "bfloat16"))
    middle = open_checkpoint(GGUF.write(first, compress(first, plan_for(first, "Q4_0")), tmp_path / "a"))
    name = "model.layers.1.self_attn.k_proj.weight"
    plan = {name: "Q8_0"}
    coded = compress(middle, plan)
    path = GGUF.write(middle, coded, tmp_path / "b")
    assert path.stat().st_size == GGUF.size(middle, plan)
    old, new = gguf.GGUFReader(middle.path), gguf.GGUFReader(path)
    for before, after in zip(old.tensors, new.tensors, strict=True):
        if before.name == "blk.1.attn_k.weight":
            assert after.tensor_type.name == "Q8_0"
        else:
            assert (before.tensor_type, before.data.tobytes()) == (after.tensor_type, after.data.tobytes())
    own = {"general.file_type", "GGUF.kv_count"}
    assert old.fields.keys() == new.fields.keys()
    for key in old.fields.keys() - own:
        assert old.fields[key].contents() == new.fields[key].contents(), key
    back = open_checkpoint(path)
    assert torch.equal(back.read(name), coded[name].decode())


def test_lazy_values_are_read_once_and_in_order(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("gpt2"))
    plan = plan_for(checkpoint, "Q4_1")
    seen = []

    def load(name: str) -> codecs.Coded:
        seen.append(name)
        return nearest(matrix(checkpoint, name), codecs.get(plan[name]))

    GGUF.write(checkpoint, LazyCoded(plan, load), tmp_path)
    assert seen == [name for name in checkpoint.tensors if name in plan]


def test_what_cannot_be_compressed(tiny_model):
    checkpoint = open_checkpoint(tiny_model("gpt2"))
    assert GGUF.codecs(checkpoint, "transformer.wpe.weight", (256, 64)) == []
    assert GGUF.codecs(checkpoint, "transformer.ln_f.weight", (64,)) == []
    assert "Q4_K" not in GGUF.codecs(checkpoint, "transformer.wte.weight", (384, 64))
    assert {"Q4_K", "Q8_0", "Q4_0"} <= set(GGUF.codecs(checkpoint, "transformer.wte.weight", (384, 256)))
    assert not any(name.startswith("int") for name in GGUF.codecs(checkpoint, "transformer.wte.weight", (384, 256)))
    assert GGUF.ties(checkpoint) == []


def test_llama3_frequencies_are_those_of_transformers(tiny_model):
    rope = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = open_checkpoint(tiny_model("llama", head_dim=64, rope_parameters=rope)).config
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)
    torch.testing.assert_close(rope_tensors(config)["rope_freqs.weight"], plain / slowed, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("family", "settings", "cause"), [
    ("llama", {"hidden_act": "gelu"}, "activation"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ("qwen3", {"attention_bias": True}, "q_proj.bias"),
    ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("bert", {}, "BertForMaskedLM"),
])  # fmt: skip
def test_refuses_what_llama_cpp_would_run_wrongly(family, settings, cause, tiny_model):
    checkpoint = open_checkpoint(tiny_model(family, **settings))
    with pytest.raises(CheckpointError, match=cause) as caught:
        GGUF.size(checkpoint, {})
    assert "compressed-tensors" in caught.value.remedy


def test_refuses_an_unknown_splitting_rule(tiny_model, tmp_path):
    source = tiny_model("llama")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}, spec["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="splitting rule"):
        GGUF.size(open_checkpoint(tmp_path), {})


def test_a_failure_leaves_no_file(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama"))
    name = "model.layers.1.mlp.up_proj.weight"

    def fail(_: str) -> codecs.Coded:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        GGUF.write(checkpoint, LazyCoded({name: "Q8_0"}, fail), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="nowhere"):
        GGUF.write(checkpoint, {"nowhere": nearest(torch.ones(4, 32), codecs.get("Q8_0"))}, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        GGUF.write(checkpoint, {name: nearest(torch.ones(4, 32), codecs.get("Q8_0"))}, tmp_path)
    for codec in ("Q4_K", "int4-g64"):  # rows of 64 weights
        with pytest.raises(CheckpointError, match="cannot hold rows of 64"):
            GGUF.size(checkpoint, {name: codec})
    assert list(tmp_path.iterdir()) == []


def test_same_input_same_bytes(tiny_model, tmp_path):
    paths: list[Path] = []
    for folder in ("a", "b"):
        checkpoint = open_checkpoint(tiny_model("phi3", "bfloat16"))
        paths.append(GGUF.write(checkpoint, compress(checkpoint, plan_for(checkpoint, "Q5_0")), tmp_path / folder))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_unknown_target():
    with pytest.raises(SupremumError, match="There is no target"):
        target("gguf2")
    assert names() == ["archive", "compressed-tensors", "gguf", "gptq", "int8"]
