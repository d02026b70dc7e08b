"""compressed-tensors folders against stock Transformers with the compressed-tensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from supremum import codecs
from supremum.checkpoint import open_checkpoint, write_compressed_tensors
from supremum.checkpoint.targets import LazyCoded, target
from supremum.errors import CheckpointError
from supremum.planning import menu_of
from supremum.runtime.transformers import Transformers
from supremum.solve import nearest

CT = target("compressed-tensors")
GGUF = target("gguf")
DOWN = "model.layers.1.mlp.down_proj.weight"
PROMPT = torch.tensor([[5, 9, 200, 31, 77, 120, 8, 300, 45, 6]])


def compress(checkpoint: Any, plan: Mapping[str, str]) -> dict[str, codecs.Coded]:
    return {name: nearest(checkpoint.read(name).float(), codecs.get(codec)) for name, codec in plan.items()}


def everywhere(checkpoint: Any, codec: str) -> dict[str, str]:
    return {n: codec for n, info in checkpoint.tensors.items() if codec in CT.codecs(checkpoint, n, tuple(info.shape))}


def answers(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


def decoded(checkpoint: Any, coded: Mapping[str, codecs.Coded]) -> Any:
    """The float model with the compressed weights in place."""
    model = checkpoint.model(torch.float32)
    with torch.no_grad():
        for name, value in coded.items():
            model.get_parameter(name).copy_(value.decode())
    return model


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(("family", "codec"), [
    ("llama", "int4-g64"), ("llama", "int3-g32"), ("llama", "int2-g64"), ("llama", "int8-channel"),
    ("mistral", "int5-g64"), ("qwen2", "int6-channel"), ("qwen3", "int4-g32"), ("gemma3", "int7-g32"),
    ("phi3", "int4-g64"), ("bert", "int4-g64"), ("albert", "int3-g64"), ("distilbert", "int8-g32"),
    ("roberta", "int4-channel"),
])  # fmt: skip
def test_stock_transformers_loads_it(family, codec, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    plan = everywhere(checkpoint, codec)
    coded = compress(checkpoint, plan)
    folder = CT.write(checkpoint, coded, tmp_path / "out")
    assert total(folder) == CT.size(checkpoint, plan)
    name = checkpoint.config.architectures[0]
    loader = AutoModelForCausalLM if name.endswith("CausalLM") else getattr(transformers, name)
    loaded, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(answers(loaded), answers(decoded(checkpoint, coded)), rtol=1e-5, atol=1e-5)


FORMATS = ("uint2-g64", "uint3-g32", "uint4-channel", "uint8-g128", "ternary-g64", "ternary-channel", "int8-channel-a8",
           "fp8-channel", "fp8-channel-a8", "fp8-b128", "mxfp4-g32", "mxfp6-g32", "mxfp8-g32", "nvfp4-g16")  # fmt: skip


@pytest.fixture
def wider(tiny_model) -> Any:
    """The tiny Llama with rows of 128 and 384 columns: groups and tiles of 128 fit; those of the keys are not whole."""
    return open_checkpoint(tiny_model("llama", "bfloat16", hidden_size=128, intermediate_size=384, num_key_value_heads=1))


@pytest.mark.parametrize("codec", FORMATS)
def test_every_format_is_read_as_we_decode_it(codec, wider, tmp_path):
    """As a user loads it, without a word about types: bit for bit what our reader makes of the same folder."""
    plan = everywhere(wider, codec)
    assert len(plan) == 14
    coded = compress(wider, plan)
    folder = CT.write(wider, coded, tmp_path / "out")
    assert total(folder) == CT.size(wider, plan)
    stock, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    again = open_checkpoint(folder)
    assert stock.dtype == torch.bfloat16 and torch.equal(answers(stock), answers(again.model(torch.bfloat16)))
    for name, value in coded.items():
        exact = value.decode().bfloat16().float() if codec.startswith("uint") else value.decode()
        assert torch.equal(again.read(name), exact)
        assert again.tensors[name].kind == codec.replace("ternary", "int2") and again.tensors[name].nbytes == value.nbytes
    assert torch.equal(stock.model.layers[1].mlp.down_proj.weight, coded[DOWN].decode().bfloat16())


@pytest.mark.parametrize("codec", FORMATS)
def test_every_format_is_proved(codec, wider, tmp_path):
    """By the stock runtime in float32, rounding of inputs included."""
    folder = CT.write(wider, compress(wider, everywhere(wider, codec)), tmp_path / "out")
    engine = Transformers(folder)
    tokens = PROMPT[0].tolist()
    (ids, found), = engine.logprobs(tokens, [len(tokens)], 384)
    ours = answers(open_checkpoint(folder).model(torch.float32))[0, -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(found), ours[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["int8-channel-a8", "fp8-channel-a8"])
def test_rounded_inputs_change_the_answers(codec, wider, tmp_path):
    """The same weights without the rounding answer otherwise: what is measured is not the weights alone."""
    coded = compress(wider, everywhere(wider, codec))
    folder = CT.write(wider, coded, tmp_path / "out")
    difference = answers(open_checkpoint(folder).model(torch.float32)) - answers(decoded(wider, coded))
    assert float(difference.abs().max()) > 1e-4


def test_small_floats_of_several_kinds_and_integers_in_one_file(wider, tmp_path):
    plan, kinds = {}, ("mxfp4-g32", "nvfp4-g16", "mxfp8-g32", "int8-channel-a8", "fp8-channel", "fp8-channel-a8", "int3-g64")
    for name in everywhere(wider, "int3-g64"):
        leaf = name.removesuffix("_proj.weight").rpartition(".")[2]
        plan[name] = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), kinds, strict=True))[leaf]
    folder = CT.write(wider, compress(wider, plan), tmp_path / "out")
    assert total(folder) == CT.size(wider, plan)
    again = open_checkpoint(folder)
    assert {name: again.tensors[name].kind for name in plan} == plan
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(folder)), answers(again.model(torch.bfloat16)))


def test_small_floats_make_a_bfloat16_model_of_any_original(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "float32"))
    folder = CT.write(checkpoint, compress(checkpoint, everywhere(checkpoint, "mxfp4-g32")), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    answers(AutoModelForCausalLM.from_pretrained(folder))
    assert 'dtype="bfloat16"' in CT.how_to_run("LlamaForCausalLM", {"mxfp4-g32"}, ".")
    assert "bfloat16" not in CT.how_to_run("LlamaForCausalLM", {"int4-g64"}, ".")


def test_zero_points_share_a_file_with_nothing_else(wider, tmp_path):
    """Stock Transformers would decode every layer by the first scheme."""
    names = list(everywhere(wider, "uint4-g64"))
    mixed = dict.fromkeys(names, "uint4-g64") | {names[0]: "int8-g64"}
    with pytest.raises(CheckpointError, match=r"uint4-g64 has zero points.*int8-g64"):
        CT.write(wider, compress(wider, mixed), tmp_path / "out")
    with pytest.raises(CheckpointError, match="zero points"):
        menu_of(CT, wider, {name: tuple(wider.tensors[name].shape) for name in names}, [], ["uint4-g64", "uint2-g64"])
    rest = dict.fromkeys(names[1:], "uint4-g64")  # what stays as it is may
    folder = CT.write(wider, compress(wider, rest), tmp_path / "rest")
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(folder)),
                       answers(open_checkpoint(folder).model(torch.bfloat16)))


def test_mixed_codecs_and_layers_left_alone(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    plan = {}
    for name in everywhere(checkpoint, "int4-g64"):
        if "layers.1.mlp" not in name:
            plan[name] = "int3-g32" if "self_attn" in name else "int8-channel"
    coded = compress(checkpoint, plan)
    folder = CT.write(checkpoint, coded, tmp_path / "out")
    assert total(folder) == CT.size(checkpoint, plan)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(answers(loaded), answers(decoded(checkpoint, coded)), rtol=1e-5, atol=1e-5)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = settings["config_groups"].values()
    targets = [module for group in groups for module in group["targets"]]
    assert sorted(targets) == sorted(name.removesuffix(".weight") for name in plan)
    assert set(settings["ignore"]) == {"lm_head", *(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down"))}
    for tied in CT.ties(checkpoint):  # what vLLM fuses is wholly in one group or wholly ignored
        assert len({next((i for i, g in enumerate(groups) if n.removesuffix(".weight") in g["targets"]), None)
                    for n in tied}) == 1  # fmt: skip


def test_one_codec_is_written_as_published_models_do(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("qwen3", "bfloat16"))
    plan = everywhere(checkpoint, "int4-g64")
    folder = CT.write(checkpoint, compress(checkpoint, plan), tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"], settings["quantization_status"]) == (
        "compressed-tensors", "pack-quantized", "compressed")  # fmt: skip
    (group,) = settings["config_groups"].values()
    assert group["targets"] == ["Linear"] and settings["ignore"] == ["lm_head"]
    assert group["weights"] == {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group",
                                "group_size": 64}  # fmt: skip
    text = "The river carries the letter."
    ours, theirs = checkpoint.tokenizer(), AutoTokenizer.from_pretrained(folder)
    assert theirs(text).input_ids == ours(text).input_ids and theirs.chat_template == ours.chat_template


def test_shards(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(write_compressed_tensors, "SHARD", 60_000)
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    plan = everywhere(checkpoint, "int4-g64")
    coded = compress(checkpoint, plan)
    seen = []

    def load(name: str) -> codecs.Coded:
        seen.append(name)
        return coded[name]

    folder = CT.write(checkpoint, LazyCoded(plan, load), tmp_path / "out")
    assert seen == [name for name in checkpoint.tensors if name in plan]
    assert total(folder) == CT.size(checkpoint, plan)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    stored = {}
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            stored.update(dict.fromkeys(tensors.keys(), file))
    assert stored == index["weight_map"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(answers(loaded), answers(decoded(checkpoint, coded)), rtol=1e-5, atol=1e-5)


def test_plain_conversion_from_gguf(tiny_model, tmp_path):
    """Decoded blocks become 16-bit floats; vectors and the tokenizer come along."""
    first = open_checkpoint(tiny_model("llama", "bfloat16"))
    plan = {n: "Q8_0" for n, i in first.tensors.items() if "Q8_0" in GGUF.codecs(first, n, tuple(i.shape))}
    checkpoint = open_checkpoint(GGUF.write(first, compress(first, plan), tmp_path / "gguf"))
    folder = CT.write(checkpoint, {}, tmp_path / "out")
    assert total(folder) == CT.size(checkpoint, {})
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = answers(checkpoint.model(torch.float32))
    assert (answers(loaded) - expected).std() < 2e-3 * expected.std()  # float16: 2^-12 a weight
    text = "The river carries 12 letters."
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == first.tokenizer()(text).input_ids


def test_its_own_folder_converts_to_gguf(tiny_model, tmp_path):
    first = open_checkpoint(tiny_model("llama", "bfloat16"))
    middle = open_checkpoint(CT.write(first, compress(first, everywhere(first, "int4-g32")), tmp_path / "ct"))
    path = GGUF.write(middle, {}, tmp_path / "gguf")
    assert path.stat().st_size == GGUF.size(middle, {})
    last = open_checkpoint(path)
    for name in middle.tensors:
        torch.testing.assert_close(last.read(name).float(), middle.read(name).float(), rtol=2**-11, atol=1e-7)


def test_which_codecs(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert CT.codecs(checkpoint, name, tuple(checkpoint.tensors[name].shape)) == []
    found = CT.codecs(checkpoint, "model.layers.0.mlp.up_proj.weight", (256, 64))
    groups = ("g32", "g64", "channel")
    assert found == sorted([*(f"int{b}-{g}" for b in range(2, 9) for g in groups), *(f"ternary-{g}" for g in groups),
                            *(f"uint{b}-{g}" for b in (2, 3, 4, 8) for g in groups), "int8-channel-a8", "fp8-channel",
                            "fp8-channel-a8", "mxfp4-g32", "mxfp6-g32", "mxfp8-g32", "nvfp4-g16"])  # fmt: skip
    assert ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.v_proj.weight"] in CT.ties(checkpoint)  # fmt: skip
    assert len(CT.ties(checkpoint)) == 4
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        gpt2 = open_checkpoint(tiny_model("gpt2"))
        CT.codecs(gpt2, "transformer.h.0.attn.c_attn.weight", (192, 64))


def test_a_failure_leaves_no_file(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama"))

    def fail(_: str) -> codecs.Coded:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        CT.write(checkpoint, LazyCoded(everywhere(checkpoint, "int4-g64"), fail), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointError, match="lm_head"):
        CT.size(checkpoint, {"lm_head.weight": "int4-g64"})
