"""GGUF files: equal to the folder they were made from, to Transformers' loading, to the gguf library's decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import _type_traits
from tokenizers import Tokenizer, models, normalizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from supremum.checkpoint import open_checkpoint, packaged
from supremum.checkpoint.gguf_header import GGUFTensor, read_header
from supremum.checkpoint.gguf_metadata import add_hyperparameters, rope_tensors
from supremum.checkpoint.gguf_tokenizer import build_tokenizer
from supremum.checkpoint.pretokenizers import RULES, name_of, rule
from supremum.checkpoint.read_gguf import read_tensor
from supremum.errors import CheckpointError
from tests.checkpoint.gguf_files import Q, convert, random_blocks
from tests.checkpoint.test_hf import outputs
from tests.conftest import DECODERS


@pytest.mark.parametrize("family", DECODERS)
def test_float_file_equals_its_folder(tiny_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    folder = open_checkpoint(tiny_model(family))
    checkpoint = open_checkpoint(convert(folder.path, tmp_path / "model.gguf"))
    assert checkpoint.format == "gguf" and set(checkpoint.tensors) == set(folder.tensors)
    assert checkpoint.tied == folder.tied
    for name in folder.tensors:
        assert torch.allclose(checkpoint.read(name).float(), folder.read(name).float(), atol=1e-6), name
    assert torch.allclose(outputs(checkpoint.model()), outputs(folder.model()), atol=2e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_tensors_equal_transformers_loading(tiny_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    path = convert(tiny_model(family), tmp_path / "model.gguf", Q.Q8_0)
    checkpoint = open_checkpoint(path)
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=checkpoint.skeleton())["tensors"]
    assert loaded
    for name, tensor in loaded.items():
        assert torch.equal(checkpoint.read(name).float(), tensor.float()), name


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.MXFP4])
def test_kinds(tiny_model: Callable[..., Path], tmp_path: Path, kind: Q) -> None:
    checkpoint = open_checkpoint(convert(tiny_model("llama"), tmp_path / "model.gguf", kind))
    info = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert (info.kind, info.shape, info.nbytes) == (kind.name, (64, 256), 64 * 256 // block * size)
    stored = {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert checkpoint.read(info.name).dtype == stored


@pytest.mark.parametrize("kind", sorted(_type_traits, key=lambda k: k.name), ids=lambda k: k.name)
def test_every_block_type_in_chunks(tmp_path: Path, kind: Q, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supremum.checkpoint.read_gguf.CHUNK", 1500)  # two rows at a time, the last alone
    raw = random_blocks(kind, 5, 768)
    path = tmp_path / "blocks"
    path.write_bytes(b"junk" + raw.numpy().tobytes())
    place = GGUFTensor("t", (5, 768), kind, 4, raw.numel())
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw.numpy(), kind)
    assert torch.equal(read_tensor(path, place).float().nan_to_num(), torch.from_numpy(expected).nan_to_num())


ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("LlamaForCausalLM", {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
                                     "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                     "original_max_position_embeddings": 8192}),
    "linear": ("LlamaForCausalLM", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "yarn": ("Qwen2ForCausalLM", {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
                                  "original_max_position_embeddings": 64}),
    "longrope": ("Phi3ForCausalLM", {"rope_type": "longrope", "rope_theta": 10000.0,
                                     "short_factor": [1.0 + 0.05 * i for i in range(8)],
                                     "long_factor": [1.0 + 2.5 * i for i in range(8)],
                                     "original_max_position_embeddings": 64}),
    "partial": ("Phi3ForCausalLM", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPE)
def test_stretched_positions_survive(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    """Written by our writer, the rotary frequencies must come back as they were."""
    from supremum.checkpoint.gguf_config import read_config

    cls, rope = ROPE[case]
    family = cls.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters=rope, architectures=[cls], pad_token_id=0,
        **({"original_max_position_embeddings": 64} if family == "Phi3" else {}))  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", family.lower())
    add_hyperparameters(writer, config)
    tensors = rope_tensors(config) | {"token_embd.weight": torch.zeros(64, 64)}
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "m.gguf")
    found = read_config(tmp_path / "m.gguf", header, lambda name: tensors[name])
    rotary = getattr(__import__(f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=["x"]),
                     f"{family}RotaryEmbedding")  # fmt: skip
    for positions in (torch.arange(16)[None], torch.arange(200)[None]):
        ours, theirs = rotary(found)(torch.zeros(1), positions), rotary(config)(torch.zeros(1), positions)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_demo_equals_transformers() -> None:
    checkpoint = open_checkpoint("demo")
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.config.rms_norm_eps == 1e-5
    kinds = {info.kind for info in checkpoint.tensors.values()}
    assert kinds == {"Q4_1", "Q8_0", "F32"}
    path = packaged("demo")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = checkpoint.model()
    assert torch.equal(outputs(model), outputs(theirs.eval()))


def test_demo_tokenizer_cuts_digits() -> None:
    """SmolLM2 splits numbers into digits, a rule that Transformers loses on the way from GGUF."""
    tokenizer = open_checkpoint("demo").tokenizer()
    tokens = tokenizer.tokenize("In 2024, x=3.14")
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġx", "=", "3", ".", "1", "4"]
    text = "<|im_start|>user\nnaïve café 東京 🙂<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2] and len(tokenizer) == 49152
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_tokenizer_of_a_tiny_file(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = open_checkpoint(tiny_model("llama"))
    ours = open_checkpoint(convert(folder.path, tmp_path / "model.gguf")).tokenizer()
    for text in ("The river moves 42 stones.", "<|im_start|>user\nhi<|im_end|>", "  tabs\tand ünïcode"):
        assert ours(text).input_ids == folder.tokenizer()(text).input_ids
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 1)


@pytest.mark.parametrize(("arch", "prefix"), [("llama", True), ("llama", False), ("gemma3", False)])
def test_sentencepiece(tmp_path: Path, arch: str, prefix: bool) -> None:
    """Scores are minus the rank of a piece, as SentencePiece's BPE trainer gives them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁r", "er", "iv", "▁riv", "▁river", "▁▁"]
    pieces += list("▁abcdefghijklmnopqrstuvwxyz")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    original = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    original.add_special_tokens(["<unk>", "<s>", "</s>"])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    for add, token in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = build_tokenizer(tmp_path / "m.gguf", read_header(tmp_path / "m.gguf").metadata)
    for text in ("the river", "  rivers  over 東", "a</s>river", ""):
        assert ours(text).input_ids == [1, *original.encode(text).ids]  # BOS unless the file says otherwise
        if "</s>" not in text:
            assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("named", [name for r in RULES for name in r.names])
def test_splitting_rules_have_an_inverse(named: str) -> None:
    found = rule(named, "file")
    spec = {"normalizer": None, "pre_tokenizer": found.json, "model": {"ignore_merges": found.ignore_merges}}
    assert name_of(spec, "file") == found.names[0]


def test_unknown_splitting_rules_are_refused() -> None:
    with pytest.raises(CheckpointError, match="my-own"):
        rule("my-own", "file")
    for spec in ({"pre_tokenizer": {"type": "Whitespace"}}, {"pre_tokenizer": None},
                 {"pre_tokenizer": RULES[0].json, "normalizer": {"type": "Lowercase"}}):  # fmt: skip
        with pytest.raises(CheckpointError, match="splitting rule"):
            name_of(spec, "file")


def test_splitting_rules_are_those_of_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name in ("llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o"):
        assert rule(name, "file").json["pretokenizers"][0]["pattern"]["Regex"] == GGUF_PRE_TOKENIZER_SPLITS[name]


def test_folder_with_one_gguf_file_opens(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_model("llama"), tmp_path / "model.gguf")
    (tmp_path / "supremum.json").write_text("{}")
    assert open_checkpoint(tmp_path).format == "gguf"
    convert(tiny_model("gpt2"), tmp_path / "second.gguf")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_checkpoint(tmp_path)
