"""Text that the model writes: drawn from its distribution, deterministic, opened and turned as the template says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.text import generate, self_generated
from supremum.text.generate import Starts, chat_pieces, draw, write

from .words import stand_in, word_tokenizer


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), width=st.integers(1, 900), scale=st.floats(0, 8),
       uniform=st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(seed, width, scale, uniform):
    logits = scale * torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    chosen = draw(logits, torch.tensor([uniform, uniform], dtype=torch.float64))
    for row, index in zip(torch.softmax(logits.double(), -1), chosen.tolist(), strict=True):
        below, above = row[:index].sum().item(), row[:index + 1].sum().item()
        assert below - 1e-5 <= uniform <= above + 1e-5 and row[index] > 0


def test_draw_has_the_distributions_frequencies():
    """Pearson's chi-square of 40,000 draws from ten classes: mean 9, deviation 4.2; 40 has probability 1e-5."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counts = torch.bincount(draw(logits.expand(40_000, 10), uniform), minlength=10)
    expected = torch.softmax(logits.double(), -1) * 40_000
    assert ((counts - expected) ** 2 / expected).sum() < 40


@pytest.mark.parametrize("elements", [1, 700, 1 << 20])
def test_draw_does_not_depend_on_how_it_is_cut(monkeypatch, elements):
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(5)).bfloat16()
    uniform = torch.rand(9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    whole = draw(logits, uniform)
    monkeypatch.setattr(generate, "ELEMENTS", elements)
    assert torch.equal(draw(logits, uniform), whole)


def test_draw_never_takes_what_has_no_probability():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0] + [-math.inf] * 600] * 4)
    assert draw(logits, torch.tensor([0.0, 0.49, 0.51, 1 - 1e-16], dtype=torch.float64)).tolist() == [1, 1, 3, 3]
    with pytest.raises(SupremumError, match="not finite"):
        draw(torch.full((1, 4), math.nan), torch.tensor([0.5], dtype=torch.float64))


def run(starts: Starts, talks: list[bool], replies: dict[int, int], length: int) -> list[list[int]]:
    """Rows from a "model" that answers token t with replies[t], and with 99 to all others."""
    def step(tokens):
        logits = torch.full((len(tokens), 128), -1e4)
        logits[torch.arange(len(tokens)), torch.tensor([replies.get(t, 99) for t in tokens.tolist()])] = 0
        return logits
    return write(step, starts, talks, length=length, generator=torch.Generator().manual_seed(0)).tolist()


def test_documents_begin_and_begin_again_with_a_start():
    starts = Starts(document=(1,), common=(50,), ends=frozenset({2}))
    assert run(starts, [False], {50: 60, 60: 2}, 9) == [[1, 50, 60, 2, 1, 50, 60, 2, 1]]
    assert run(starts, [True], {50: 60, 60: 2}, 4) == [[1, 50, 60, 2]]  # no template: a document


def test_conversations_take_turns():
    starts = Starts(document=(), common=(50,), ends=frozenset({2}), opening=(10, 11), to_assistant=(2, 12),
                    to_user=(2, 13))
    rows = run(starts, [True, False], {11: 60, 12: 61, 13: 62, 60: 2, 61: 2, 62: 2, 50: 2}, 10)
    assert rows[0] == [10, 11, 60, 2, 12, 61, 2, 13, 62, 2]
    assert rows[1] == [50, 2] * 5


def test_the_template_is_taken_apart_at_the_words():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}w{{ 1 if m.role == 'user' else 2 }} {{ m.content }} </s> "
                               "{% endfor %}")
    assert chat_pieces(tokenizer) == ((6,), (2, 7), (2, 6))
    for broken in ("{{ messages.nothing.at_all }}", "{{ raise_exception('no') }}", "same for all", "{% if"):
        tokenizer.chat_template = broken
        assert chat_pieces(tokenizer) == ((), (), ())
    tokenizer.chat_template = None
    assert chat_pieces(tokenizer) == ((), (), ())


def test_the_same_seed_writes_the_same_text(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))

    def text(seed, batch=4):
        return self_generated(checkpoint, tokens=6 * 24, length=24, seed=seed, batch=batch, dtype=torch.float32)

    first = text(0)
    assert first.shape == (6, 24) and first.dtype == torch.int64 and first.min() >= 0 and first.max() < 384
    assert torch.equal(text(0), first) and not torch.equal(text(1), first)
    assert len({tuple(row) for row in text(2, batch=1).tolist()}) == 6
    opening = torch.tensor(chat_pieces(checkpoint.tokenizer())[0])
    assert [bool((row[:len(opening)] == opening).all()) for row in first] == [False, True] * 3


def test_the_cache_bounds_the_batch(tiny_model, monkeypatch):
    """Two layers, two key heads of 16, float32: 512 bytes a position, 12 KiB a row of 24."""
    checkpoint, batches = open_checkpoint(tiny_model("llama")), []
    monkeypatch.setattr(generate, "CACHE", 40_000)
    monkeypatch.setattr(generate, "write", lambda step, starts, talks, **kwargs: batches.append(len(talks)) or
                        torch.zeros(len(talks), 24, dtype=torch.int64))
    assert self_generated(checkpoint, tokens=24 * 8, length=24, seed=0, dtype=torch.float32).shape == (8, 24)
    assert batches == [3, 3, 2]


def test_what_is_written_is_likely_to_the_model(tiny_model):
    """E[-log p(x)] of sampled tokens is the entropy E[H(p)]; of uniformly random tokens it is far more."""
    checkpoint = open_checkpoint(tiny_model("llama", initializer_range=0.4))
    rows = self_generated(checkpoint, tokens=64 * 40, length=40, seed=0, dtype=torch.float32, chat=0.0)
    with torch.inference_mode():
        logp = torch.log_softmax(AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()(rows).logits[:, 1:-1], -1)
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    surprise = -logp.gather(2, rows[:, 2:, None])
    error = surprise.std().item() / math.sqrt(surprise.numel())
    after_end = (rows[:, 1:-1] == 1).float().mean().item()  # what follows an end is given, not sampled
    assert after_end < 0.02
    assert surprise.mean().item() == pytest.approx(entropy, abs=5 * error + 10 * after_end)


def test_models_that_write_nothing_are_refused(tiny_model):
    with pytest.raises(SupremumError, match=r"BertForMaskedLM does not write text\. Give .* --text"):
        self_generated(open_checkpoint(tiny_model("bert")), tokens=64, length=16, seed=0)


@pytest.mark.parametrize("tokens, length, message", [
    (8, 16, "less than one window"), (16, 1, "nothing to predict"), (512, 512, "model's context of 256")])
def test_impossible_budgets_are_refused(tiny_model, tokens, length, message):
    with pytest.raises(SupremumError, match=message):
        self_generated(open_checkpoint(tiny_model("llama")), tokens=tokens, length=length, seed=0)


def test_starts_are_words_of_the_first_part_of_the_vocabulary():
    tokenizer = stand_in(word_tokenizer()).tokenizer()
    assert set(generate.common_tokens(tokenizer, 1003)) <= set(range(5, 512))
