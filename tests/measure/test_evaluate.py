"""Quality of whole models: against a computation as the referee does it, for every family, and every refusal."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.measure import EncoderQuality, evaluate, evaluate_files, evaluate_texts, render, scores
from supremum.measure.answers import Answers

WINDOWS = torch.randint(2, 384, (4, 40), generator=torch.Generator().manual_seed(0))


def disturbed(folder, target, size=0.05):
    """A copy of the model whose matrices are off by `size` of their own standard deviation."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, weight in tensors.items():
        if weight.ndim == 2:
            tensors[name] = weight + size * weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@torch.inference_mode()
def by_the_book(reference, candidate, windows, shift):
    """As the referee does it: plain forward passes of stock models, whole log-softmaxes, torch's own statistics."""
    kls, nll, nll_reference, agree = [], [], [], []
    for window in windows:
        last = -1 if shift else None
        logp = torch.log_softmax(reference(window[None]).logits[0, :last].double(), -1)
        logq = torch.log_softmax(candidate(window[None]).logits[0, :last].double(), -1)
        target = window[1 if shift else 0:, None]
        kls.append((logp.exp() * (logp - logq)).sum(-1))
        nll.append(-logq.gather(1, target)[:, 0])
        nll_reference.append(-logp.gather(1, target)[:, 0])
        agree.append((logp.argmax(-1) == logq.argmax(-1)).double())
    means = torch.stack([kl.mean() for kl in kls])
    return {"perplexity": torch.cat(nll).mean().exp(), "perplexity_reference": torch.cat(nll_reference).mean().exp(),
            "kl_mean": means.mean(), "kl_se": means.std() / math.sqrt(len(means)),
            "kl_median": torch.cat(kls).quantile(0.5), "kl_p99": torch.cat(kls).quantile(0.99),
            "same_top": torch.cat(agree).mean(), "tokens": torch.tensor(float(len(torch.cat(kls))))}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "phi3"])
def test_decoders_agree_with_the_book(family, tiny_model, tmp_path):
    folder = tiny_model(family)
    other = disturbed(folder, tmp_path / "other")
    expected = by_the_book(*(AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, other)), WINDOWS, True)
    got = evaluate(open_checkpoint(other), open_checkpoint(folder), WINDOWS).to_dict()
    assert {name: got[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=2e-4)
    assert (got["windows"], got["objective"]) == (4, "next")


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "albert"])
def test_masked_language_heads_answer_at_every_position(family, tiny_model, tmp_path):
    folder = tiny_model(family)
    other = disturbed(folder, tmp_path / "other")
    expected = by_the_book(*(AutoModelForMaskedLM.from_pretrained(f).eval() for f in (folder, other)), WINDOWS, False)
    got = evaluate(open_checkpoint(other), open_checkpoint(folder), WINDOWS).to_dict()
    assert {name: got[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=2e-4)
    assert (got["tokens"], got["objective"]) == (160, "every")


def test_headless_encoders_are_compared_by_their_pooled_output(tiny_model, tmp_path):
    folder = tiny_model("bert", architecture="BertModel")
    other = disturbed(folder, tmp_path / "other")
    models = [AutoModel.from_pretrained(f).eval() for f in (folder, other)]
    with torch.inference_mode():
        one, two = (model(WINDOWS).last_hidden_state.mean(1) for model in models)
    got = evaluate(open_checkpoint(other), open_checkpoint(folder), WINDOWS)
    assert isinstance(got, EncoderQuality)
    cosine = torch.nn.functional.cosine_similarity(one, two)
    error = (one - two).norm(dim=1) / one.norm(dim=1)
    assert got.cosine_mean == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert got.cosine_min == pytest.approx(cosine.min().item(), abs=1e-6)
    assert got.relative_error_mean == pytest.approx(error.mean().item(), rel=1e-3)
    assert got.relative_error_se == pytest.approx(error.std().item() / 2, rel=1e-3)
    assert (got.tokens, got.windows) == (160, 4)
    with pytest.raises(SupremumError, match=r"predicts no tokens.*--reference"):
        evaluate(open_checkpoint(other), None, WINDOWS)


def test_without_a_reference_there_is_perplexity_alone(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    alone, beside = evaluate(checkpoint, None, WINDOWS), evaluate(checkpoint, checkpoint, WINDOWS)
    assert alone.perplexity == beside.perplexity == beside.perplexity_reference
    assert alone.kl_mean is None and alone.same_top is None
    assert (beside.kl_mean, beside.kl_max, beside.same_top, beside.excess_nll) == (0, 0, 1, 0)


def test_logits_that_are_capped_are_not_mistaken_for_the_heads(tiny_model):
    """Gemma caps its logits after the head: hidden states and head alone would give others."""
    model = open_checkpoint(tiny_model("gemma3", final_logit_softcapping=0.3)).model(torch.float32)
    answers = Answers(model, WINDOWS)
    with torch.inference_mode():
        torch.testing.assert_close(answers.window(0)(slice(5, 9)), model(WINDOWS[:1]).logits[0, 5:9])


def test_blocks_of_positions_do_not_change_the_figures(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("llama")
    pair = open_checkpoint(disturbed(folder, tmp_path / "other")), open_checkpoint(folder)
    whole = evaluate(*pair, WINDOWS)
    monkeypatch.setattr(scores, "ELEMENTS", 384 * 7)
    cut = evaluate(*pair, WINDOWS)
    assert dataclasses.astuple(cut)[:-1] == pytest.approx(dataclasses.astuple(whole)[:-1], rel=1e-5)


def test_evaluate_files_scores_text(tiny_model, tmp_path):
    folder = tiny_model("llama")
    other = disturbed(folder, tmp_path / "other")
    (tmp_path / "a.txt").write_text("The river carries the stone at 7 o'clock, and the bridge waits. " * 40)
    got = evaluate_files(other, folder, text=[tmp_path / "a.txt"], tokens=160, length=32, dtype="bfloat16")
    assert (got.windows, got.tokens) == (5, 155) and got.kl_mean > 0
    json.dumps(got.to_dict(), allow_nan=False)
    again = evaluate_files(other, folder, text=[tmp_path / "a.txt"], tokens=160, length=32, dtype="bfloat16")
    assert again == got
    assert evaluate_files(other, folder, tokens=64, length=16).windows == 4  # on what the reference writes


def test_windows_are_what_the_model_takes_unless_asked_for(tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text("The river carries the stone at 7 o'clock, and the bridge waits. " * 60)
    for family, context in (("llama", 256), ("bert", 128)):
        folder = tiny_model(family, max_position_embeddings=context)
        (found,) = evaluate_texts(folder, folder, texts=[tmp_path / "a.txt"], tokens=600)
        assert found.quality.windows == 600 // context
    assert evaluate_files(tiny_model("llama"), text=[tmp_path / "a.txt"], tokens=100).tokens == 99  # fewer than a window


def test_refusals(tiny_model, tmp_path):
    folder = tiny_model("llama")
    (tmp_path / "a.txt").write_text("The river carries the stone. " * 40)
    other = shutil.copytree(folder, tmp_path / "renamed")
    text = (other / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    vocabulary["model"]["vocab"]["QQQ"] = vocabulary["model"]["vocab"].pop("Z")
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(SupremumError, match=r"different vocabularies \(384 and 384 tokens, 1 of"):
        evaluate_files(other, folder, text=[tmp_path / "a.txt"], tokens=64, length=16)
    with pytest.raises(SupremumError, match="int8 is not a type that models compute in"):
        evaluate_files(folder, text=[tmp_path / "a.txt"], dtype="int8")
    with pytest.raises(SupremumError, match="model's context of 256"):
        evaluate_files(folder, text=[tmp_path / "a.txt"], tokens=2048, length=1024)
    with pytest.raises(SupremumError, match=r"The reference is a BertForMaskedLM, the candidate a LlamaForCausalLM"):
        evaluate(open_checkpoint(folder), open_checkpoint(tiny_model("bert")), WINDOWS)
    with pytest.raises(ValueError, match="windows must be"):
        evaluate(open_checkpoint(folder), None, WINDOWS[0])


@pytest.mark.parametrize("family, architecture", [("llama", None), ("bert", None), ("bert", "BertModel")])
def test_the_table_fits_80_columns(family, architecture, tiny_model):
    checkpoint = open_checkpoint(tiny_model(family, architecture=architecture))
    console = Console(width=80, file=io.StringIO())
    console.print(render(evaluate(checkpoint, checkpoint, WINDOWS)))
    shown = console.file.getvalue()
    assert "160 tokens in 4 windows" in shown or "156 tokens in 4 windows" in shown
    assert ("KL to the reference" in shown) == (architecture is None)
    assert ("perplexity, unmasked" in shown) == (family == "bert" and architecture is None)
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
