"""The proof: sound files of every family pass in the stock runtimes, broken ones do not."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.gguf_layout import Layout
from supremum.checkpoint.gguf_types import KINDS
from supremum.checkpoint.targets import target
from supremum.errors import SupremumError
from supremum.runtime import load, names
from supremum.runtime.verify import _speed, compare, verify
from supremum.solve import nearest

from ..conftest import DECODERS

GGUF, CT = target("gguf"), target("compressed-tensors")
LLAMA3 = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_theta": 1e4, "rope_type": "longrope", "long_factor": [1.0 + i for i in range(8)],
        "short_factor": [1.0 + i / 8 for i in range(8)], "original_max_position_embeddings": 64}  # fmt: skip
VARIANTS = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "partial rotation": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "own head": ("qwen3", {"tie_word_embeddings": False}),
    "head size": ("mistral", {"head_dim": 32}),
    "windows": ("gemma3", {"num_hidden_layers": 7, "sliding_window": 16}),
}


def compressed(checkpoint, codec: str) -> dict[str, codecs.Coded]:
    plan = {n: codec for n, i in checkpoint.tensors.items() if codec in GGUF.codecs(checkpoint, n, tuple(i.shape))}
    return {n: nearest(checkpoint.read(n).float(), codecs.get(codec)) for n in plan}


@pytest.mark.parametrize("family", DECODERS)
def test_llama_cpp_answers_as_we_decode(family, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    coded = {} if family == "gpt2" else compressed(checkpoint, "Q4_0")
    proof = verify(GGUF.write(checkpoint, coded, tmp_path), GGUF, threads=1)
    assert proof.passed and proof.same_tokens and proof.kl_mean < 2e-3
    assert proof.relative_error == pytest.approx(proof.expected_error, rel=0.2)
    assert proof.positions == 12 and proof.prefill_tokens_per_second > 0 and proof.decode_tokens_per_second > 0


@pytest.mark.parametrize("codec", [name for name in codecs.names() if name in KINDS])
def test_llama_cpp_runs_every_block_type(codec, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16", hidden_size=256, num_attention_heads=8))
    coded = compressed(checkpoint, codec)
    assert len(coded) == 16  # the embedding and the head too
    proof = verify(GGUF.write(checkpoint, coded, tmp_path), GGUF, threads=1)
    assert proof.relative_error == pytest.approx(proof.expected_error, rel=0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_on_variants(variant, tiny_model, tmp_path):
    family, settings = VARIANTS[variant]
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16", **settings))
    proof = verify(GGUF.write(checkpoint, {}, tmp_path), GGUF, checkpoint, threads=1)
    assert proof.kl_mean < 1e-4 and proof.relative_error < 0.02


def test_lost_permutation_is_found(tiny_model, tmp_path, monkeypatch):
    """Written and read back without it, our decoding is right and llama.cpp's is not."""
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    monkeypatch.setattr(Layout, "rows", lambda self, tensor, count: None)
    with pytest.raises(SupremumError, match="answers differently"):
        verify(GGUF.write(checkpoint, {}, tmp_path), GGUF, threads=1)


def test_wrong_scales_are_found(tiny_model, tmp_path):
    """One matrix of fourteen, its scales a third too large."""
    checkpoint = open_checkpoint(tiny_model("qwen2", "bfloat16"))
    coded = compressed(checkpoint, "Q8_0")
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = nearest(checkpoint.read(name).float() * 4 / 3, codecs.get("Q8_0"))
    sound = open_checkpoint(GGUF.write(checkpoint, coded, tmp_path / "sound"))
    path = GGUF.write(checkpoint, coded | {name: wrong}, tmp_path / "wrong")
    assert verify(sound.path, GGUF, sound, threads=1).passed
    with pytest.raises(SupremumError, match="answers differently"):
        verify(path, GGUF, sound, threads=1)


def test_wrong_tokenizer_is_found(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    path = GGUF.write(checkpoint, {}, tmp_path)
    data = path.read_bytes()
    assert data.count(b"gpt-2") == 1
    path.write_bytes(data.replace(b"gpt-2", b"qwen2"))  # llama.cpp cuts digits and capitals by another rule
    with pytest.raises(SupremumError, match="same token ids: False"):
        verify(path, GGUF, checkpoint, threads=1)


def test_transformers_agrees_exactly_and_shows_a_wrong_scale(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    plan = [n for n, i in checkpoint.tensors.items() if CT.codecs(checkpoint, n, tuple(i.shape))]
    coded = {n: nearest(checkpoint.read(n).float(), codecs.get("int4-g32")) for n in plan}
    folder = CT.write(checkpoint, coded, tmp_path / "sound")
    proof = verify(folder, CT, threads=1)
    assert proof.kl_mean < 1e-9 and proof.relative_error < 1e-4 and proof.same_top == 1
    one = coded[plan[3]]
    scale = one.tensors["weight_scale"].clone()
    scale[0, 0] *= 2
    other = CT.write(checkpoint, coded | {plan[3]: replace(one, tensors=one.tensors | {"weight_scale": scale})},
                     tmp_path / "wrong")  # fmt: skip
    with pytest.raises(SupremumError, match="answers differently"):
        verify(other, CT, open_checkpoint(folder), threads=1)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertForTokenClassification",
                                          "BertForQuestionAnswering"])
def test_heads_of_tasks_are_proved_and_a_changed_one_is_found(architecture, tiny_model, tmp_path):
    """The class, the tags, the marked answer: what the head says behind each beginning of a text."""
    source = tiny_model("bert", architecture=architecture)
    folder = CT.write(open_checkpoint(source), {}, tmp_path / "out")
    assert verify(folder, CT, threads=1).passed
    head = "qa_outputs.weight" if "Question" in architecture else "classifier.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[head] = tensors[head] * 1.2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SupremumError, match="answers differently"):
        verify(folder, CT, open_checkpoint(source), threads=1)


def test_failures_name_their_cause(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    path = GGUF.write(checkpoint, {}, tmp_path)
    with pytest.raises(SupremumError, match="no answer in"):
        verify(path, GGUF, checkpoint, timeout=0.05)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(SupremumError, match="cannot load it") as caught:
        verify(path, GGUF, checkpoint, threads=1)
    assert "within the file bounds" in caught.value.remedy or "corrupted" in caught.value.remedy
    with pytest.raises(SupremumError, match="gptqmodel, llama_cpp, transformers"):
        load("onnx", path)
    assert names() == ["gptqmodel", "llama_cpp", "transformers"]


def test_a_system_without_affinities_proves_too(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    assert verify(CT.write(open_checkpoint(tiny_model("llama")), {}, tmp_path), CT).threads == os.cpu_count()


def test_compare_is_kl_and_pooling_lowers_it():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 40, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    every = torch.arange(40).expand(5, 40)
    kl, error, largest, _ = compare(p, every, q)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(error, (q - p).std(1) / p.std(1))
    assert largest == (q - p)[:, :16].abs().max()
    values, ids = q.topk(8)
    pooled = compare(p, ids, values)[0]
    assert (pooled <= expected + 1e-12).all() and (pooled > 0).all()
    assert compare(p, every, p)[0].abs().max() < 1e-12 and compare(p, every, p)[3] == 1


@pytest.mark.parametrize("family, context", [("roberta", 130 - 2), ("bert", 130), ("gpt2", 256)])
def test_the_speed_stays_within_the_context(family: str, context: int, tiny_model) -> None:
    """A roberta's first place is two after its padding's number, 1."""
    tokens, new = _speed(open_checkpoint(tiny_model(family)), [[5] * 10])
    assert (len(tokens), new) == (min(128, context // 2), min(32, context // 4))
