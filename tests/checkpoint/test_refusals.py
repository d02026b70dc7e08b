"""What must not open: damaged, hostile and contradictory folders, each refused by name, with a cause and a remedy."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.safetensors_file import SafetensorsFile
from supremum.errors import CheckpointError

Edit = Callable[[Path], Any]


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def weights(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    def change(folder: Path) -> None:
        save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return change


def index(edit: Callable[[dict[str, str], Path], Any]) -> Edit:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        data = json.loads(path.read_text())
        edit(data["weight_map"], folder)
        path.write_text(json.dumps(data))

    return change


def text(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, keep: float) -> Edit:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def linked_out(folder: Path) -> None:
    target = shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(target)


def linked_round(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def poisoned(value: float) -> Edit:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return tensors

    return weights(edit)


def one_of_many(weight_map: dict[str, str]) -> str:
    """A tensor that shares its shard."""
    return next(n for n, f in weight_map.items() if list(weight_map.values()).count(f) > 1)


def renamed(weight_map: dict[str, str], to: str) -> None:
    weight_map[one_of_many(weight_map)] = to


EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SINGLE: dict[str, tuple[Edit, str]] = {
    "missing tensor": (weights(lambda t: {n: v for n, v in t.items() if n != UP}), "missing, first model.layers.1"),
    "unexpected tensor": (weights(lambda t: t | {"model.extra.weight": torch.ones(2)}), "does not have.* model.extra"),
    "same tensor twice": (weights(lambda t: t | {UP.removeprefix("model."): t[UP].clone()}), "are both the tensor"),
    "wrong shape": (weights(lambda t: t | {UP: torch.ones(255, 64)}), r"up_proj.weight has shape \(255, 64\)"),
    "NaN": (poisoned(float("nan")), f"{UP} holds NaN or Inf"),
    "Inf": (poisoned(float("-inf")), f"{UP} holds NaN or Inf"),
    "integers": (weights(lambda t: t | {UP: torch.ones(256, 64, dtype=torch.int8)}), "is I8"),
    "more layers": (config(num_hidden_layers=3), "tensor.s. of LlamaForCausalLM are missing"),
    "fewer layers": (config(num_hidden_layers=1), "does not have, first model.layers.1"),
    "a billion layers": (config(num_hidden_layers=10**9), "1000000000 layers, but"),
    "no hidden size": (config(hidden_size=0), "hidden_size is 0"),
    "negative size": (config(intermediate_size=-256), "intermediate_size is -256"),
    "size as text": (config(hidden_size="64"), "config.json"),
    "huge size": (config(vocab_size=2**40), "vocab_size is 1099511627776"),
    "larger than memory": (config(intermediate_size=2**31 - 1), "shape|build"),
    "odd heads": (config(num_attention_heads=7, head_dim=None), "config.json|shape"),
    "other vocabulary": (config(vocab_size=400), r"has shape \(384, 64\), the config says \(400, 64\)"),
    "unknown rope": (config(rope_parameters={"rope_type": "magic", "rope_theta": 1e4}), "config.json"),
    "unknown class": (config(architectures=["LlamaForWorldPeace"]), "no architecture LlamaForWorldPeace"),
    "not a model class": (config(architectures=["AutoTokenizer"]), "no architecture AutoTokenizer"),
    "dunder class": (config(architectures=["__builtins__"]), "no architecture __builtins__"),
    "no class": (config(architectures=None), "names no model class"),
    "class as a number": (config(architectures=1), "names no model class"),
    "a billion labels": (config(num_labels=10**9), "num_labels is 1000000000"),
    "class of another family": (config(architectures=["GPT2LMHeadModel"]), "does not belong to model_type"),
    "unknown type": (config(model_type="never-heard"), "does not understand"),
    "remote code": (config(auto_map={"AutoModelForCausalLM": "modeling_evil.EvilModel"}), "own code .modeling_evil"),
    "remote code elsewhere": (config(auto_map={"AutoModel": "x/y--modeling_llama.LlamaModel"}), "own code"),
    "quantised with awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised already .awq"),
    "unknown quantisation": (config(quantization_config={"quant_method": "mine"}), "quantised already .mine"),
    "broken config": (text("config.json", '{"model_type": "llama", '), "not valid JSON"),
    "config as list": (text("config.json", "[1, 2]"), "not an object"),
    "config not UTF-8": (text("config.json", b'{"a": "\xff"}'), "not valid JSON"),
    "key twice": (text("config.json", '{"hidden_size": 64, "hidden_size": 65}'), "'hidden_size' appears twice"),
    "deep config": (text("config.json", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "adapter": (adapter, "PEFT adapter"),
    "truncated": (cut("model.safetensors", 0.5), "the tensors end at byte|truncated"),
    "empty": (text("model.safetensors", b""), "is empty"),
    "LFS pointer": (text("model.safetensors", POINTER), "Git-LFS pointer"),
    "LFS config": (text("config.json", POINTER), "Git-LFS pointer"),
    "pickle": (pickled, "pytorch_model.bin: the weights are a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "two sets of weights": (text("model.safetensors.index.json", "{}"), "holds both"),
    "link out": (linked_out, "leads outside the folder"),
    "link to itself": (linked_round, "model.safetensors"),
    "pipe": (pipe, "not a regular file"),
    "folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "not a regular file"),
}  # fmt: skip
SHARDED: dict[str, tuple[Edit, str]] = {
    "path upwards": (index(lambda m, f: renamed(m, "../other/model.safetensors")), "points outside"),
    "absolute path": (index(lambda m, f: renamed(m, "/etc/passwd")), "points outside"),
    "windows path": (index(lambda m, f: renamed(m, "C:\\model.safetensors")), "points outside"),
    "missing shard": (index(lambda m, f: (f / next(iter(m.values()))).unlink()), "cannot be opened"),
    "wrong shard": (index(lambda m, f: renamed(m, max({*m.values()} - {m[one_of_many(m)]}))), "it does not|lists it in"),
    "unlisted": (index(lambda m, f: m.pop(one_of_many(m))), "does not list it"),
    "invented": (index(lambda m, f: m.update(ghost=next(iter(m.values())))), "holds ghost; it does not"),
    "no map": (text("model.safetensors.index.json", "{}"), "has no weight_map"),
    "map of lists": (text("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}'), "has no weight_map"),
    "empty name": (index(lambda m, f: renamed(m, "")), "points outside"),
}  # fmt: skip


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert str(folder) in caught.value.cause and caught.value.remedy


@pytest.mark.parametrize("case", SINGLE)
def test_single_file(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    edit, message = SINGLE[case]
    edit(folder)
    refuse(folder, message)


@pytest.mark.parametrize("case", SHARDED)
def test_shards(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(tiny_model("llama", shard="100KB"), tmp_path / "model"))
    edit, message = SHARDED[case]
    edit(folder)
    refuse(folder, message)


def test_one_tensor_in_two_shards(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama", shard="100KB"), tmp_path / "model"))
    shards = sorted(folder.glob("model-*.safetensors"))
    save_file(load_file(shards[0]) | load_file(shards[1]), shards[1])
    refuse(folder, "lists it in")


def test_tied_weights_that_differ(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))
    weights(lambda t: t | {HEAD: t[EMBED] + 1})(folder)
    refuse(folder, "differ, but the config ties them")


def test_positions_that_would_fill_the_memory(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Buffers as long as max_position_embeddings are not built before the file's shapes have been compared."""
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    config(max_position_embeddings=2**31 - 1)(folder)
    refuse(folder, "position_embeddings.weight has shape")


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "distilbert"])
def test_a_billion_layers(tiny_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Some configs make a list as long as their layers: the count is refused before the config is built."""
    folder = Path(shutil.copytree(tiny_model(family), tmp_path / "model"))
    config(**{{"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers"): 10**9})(folder)
    refuse(folder, "1000000000 layers, but the weights hold only")


def test_auto_map_of_classes_that_transformers_has(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Phi-3's published config still names code that Transformers contains today: opened, nothing is run."""
    folder = Path(shutil.copytree(tiny_model("phi3"), tmp_path / "model"))
    classes = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    config(auto_map=classes)(folder)
    (folder / "modeling_phi3.py").write_text("raise SystemExit('run')")
    assert type(open_checkpoint(folder).skeleton()).__module__.startswith("transformers.")


def test_tokenizer_of_the_folders_own_code(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    refuse(folder, "own code")


def test_damaged_tokenizer(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        open_checkpoint(folder).tokenizer()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_checkpoint(folder).tokenizer()


@pytest.mark.parametrize("source", ["no/such-model", "./nowhere", "missing.gguf", "/nowhere", "a b", "", "x/y/z"])
def test_names_that_lead_nowhere(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


def header(entries: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[bytes, str]] = {
    "seven bytes": (b"1234567", "too few"),
    "length 2^63": (header({}, length=2**63), "claims a header"),
    "length beyond the file": (header({}, length=3), "claims a header"),
    "not JSON": (header(b"{'a'}"), "not valid JSON"),
    "nested": (header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "not valid JSON|recursion|not described"),
    "name twice": (header(b'{"a": {}, "a": {}}'), "appears twice"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "not described"),
    "number": (header({"a": 1}), "not described"),
    "unknown dtype": (header({"a": entry("F99")}, bytes(8)), "unknown dtype"),
    "dtype as list": (header({"a": entry(["F32"])}, bytes(8)), "unknown dtype"),
    "negative dimension": (header({"a": entry(shape=[-2])}, bytes(8)), "impossible shape"),
    "fraction": (header({"a": entry(shape=[2.0])}, bytes(8)), "impossible shape"),
    "boolean": (header({"a": entry(shape=[True, 2])}, bytes(8)), "impossible shape"),
    "overflow": (header({"a": entry(shape=[2**32, 2**32])}, bytes(8)), "dtype and shape ask for"),
    "shape and bytes": (header({"a": entry(shape=[3])}, bytes(8)), "8 bytes; dtype and shape ask for 12"),
    "offset outside": (header({"a": entry(offsets=[8, 16])}, bytes(8)), "gap"),
    "backwards": (header({"a": entry(offsets=[8, 0])}, bytes(8)), "-8 bytes"),
    "overlap": (header({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "gap": (header({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "gap"),
    "trailing bytes": (header({"a": entry()}, bytes(9)), "the tensors end"),
    "missing bytes": (header({"a": entry()}, bytes(7)), "the tensors end"),
    "digits": (header(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % (b"9" * 5000)), "JSON|shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path: Path, case: str) -> None:
    data, message = HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in caught.value.cause and caught.value.remedy


def test_a_file_that_shrinks_while_it_is_open(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="ended while it was being read"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


VALID = header({"__metadata__": {"format": "pt"}, "w": entry(), "b": entry("BF16", [3], [8, 14])}, bytes(14))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
       keep=st.integers(0, len(VALID) + 8))  # fmt: skip
def test_mutated_headers_never_crash(tmp_path: Path, edits: list[tuple[int, int]], keep: int) -> None:
    data = bytearray(VALID + bytes(8))
    for place, value in edits:
        data[place] = value
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data[:keep])
    try:
        file = SafetensorsFile(path)
        for name in file.entries:
            file.read(name)
    except CheckpointError as error:
        assert str(path) in error.cause
