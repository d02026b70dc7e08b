"""Explanations: shares against single replacements written out, the pieces chosen, attention as Transformers gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.measure import evaluate_texts
from supremum.measure import explain as module
from supremum.measure.explain import Explained, Question, Side, attention, parted, pieces, shares
from supremum.measure.scores import TokenScores
from supremum.measure.table import answered, weighed
from supremum.text import tokens_from_text
from tests.conftest import tiny_tokenizer
from tests.measure.test_evaluate import disturbed


def said_at(ids: torch.Tensor, place: int, target: int) -> Question:
    """What is said at a place of a text."""
    return Question({"input_ids": ids[None]}, list(range(len(ids))), [str(index) for index in ids.tolist()],
                    lambda output: output.logits[:, place : place + 1], [target], "", "", lambda logits_RV: "")


@pytest.mark.parametrize("family, auto", [("llama", AutoModelForCausalLM), ("gemma3", AutoModelForCausalLM),
                                          ("bert", AutoModelForMaskedLM)])
def test_a_share_is_what_one_replacement_takes(family: str, auto: Any, tiny_model: Any) -> None:
    model = auto.from_pretrained(tiny_model(family)).eval()
    ids, place, target = torch.arange(20, 31), 6, 9
    found = shares(model, said_at(ids, place, target))
    with torch.no_grad():
        table = model.get_input_embeddings()
        whole_VD = table(torch.arange(384))
        for changed in (0, 6, 10):
            x_1TD = table(ids[None]).clone()
            before = model(inputs_embeds=x_1TD).logits[0, place].log_softmax(-1)[target]
            assert torch.allclose(before, model(input_ids=ids[None]).logits[0, place].log_softmax(-1)[target], atol=1e-5)
            x_1TD[0, changed] = whole_VD.mean(0)
            after = model(inputs_embeds=x_1TD).logits[0, place].log_softmax(-1)[target]
            assert found[changed] == pytest.approx(float(before - after), abs=1e-5)
    if family != "bert":
        assert max(map(abs, found[7:])) < 1e-6 < abs(found[6])  # a decoder does not read what comes later


def test_attention_is_the_mean_over_heads_and_the_way_of_computing_it_is_put_back(tiny_model: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    way, ids = model.config._attn_implementation, torch.arange(20, 27)
    found = attention(model, said_at(ids, 6, 9))
    assert list(found) == ["block 2 of 2"] and model.config._attn_implementation == way != "eager"
    eager = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager").eval()
    maps = eager(input_ids=ids[None], output_attentions=True).attentions[1][0].mean(0)
    assert torch.allclose(torch.tensor(found["block 2 of 2"]), maps, atol=1e-4)


def test_pieces_end_at_the_answers_that_moved_most_and_do_not_overlap(tiny_model: Any, tmp_path: Any) -> None:
    one = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    other = AutoModelForCausalLM.from_pretrained(disturbed(tiny_model("llama"), tmp_path / "x", 0.5)).eval()
    windows = torch.randint(2, 384, (2, 101), generator=torch.Generator().manual_seed(0))
    kl_nT = torch.full((2, 100), 0.01)
    for window, at, value in ((0, 50, 3.0), (0, 51, 2.9), (1, 90, 2.0)):
        kl_nT[window, at] = value
    scores = [TokenScores(kl, kl=kl) for kl in kl_nT]
    chosen = pieces(windows, scores, tiny_tokenizer(), other, one, count=8, shift=True)
    ends = {tuple(asked.inputs["input_ids"][0].tolist()) for asked in chosen}
    assert tuple(windows[0, 19:51].tolist()) in ends and tuple(windows[1, 59:91].tolist()) in ends
    assert tuple(windows[0, 20:52].tolist()) not in ends


def test_evaluate_explains_what_changed_and_says_what_is_missing(tiny_model: Any, tmp_path: Any,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model = disturbed(tiny_model("llama"), tmp_path / "x", 0.5)
    (tmp_path / "t.txt").write_text("The river moves the stone at 3 o'clock, and window 2 waits for letters. " * 12)
    text = [tmp_path / "t.txt"]
    (found,) = evaluate_texts(model, tiny_model("llama"), texts=text, tokens=128, length=64, explained=2)
    assert len(found.explained) == 2
    for one in found.explained:
        assert len(one.tokens) == len(one.model.shares) == len(one.reference.shares) and one.kl > 0
        assert one.reference.top == one.target and -1 <= one.likeness <= 1
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SupremumError, match=r"pip install 'supremum\[explain\]'"):
        evaluate_texts(model, texts=text, tokens=128, length=64, explained=1)


@pytest.mark.parametrize("family, auto", [("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
def test_alone_the_worst_guesses_are_explained(family: str, auto: Any, tiny_model: Any, tmp_path: Any) -> None:
    """A piece by itself, its likeliest token and the one that follows, by stock Transformers."""
    (tmp_path / "t.txt").write_text("The river moves the stone at 3 o'clock, and window 2 waits for letters. " * 12)
    (found,) = evaluate_texts(tiny_model(family), texts=[tmp_path / "t.txt"], tokens=128, length=64, explained=3)
    model, tokenizer = auto.from_pretrained(tiny_model(family)).eval(), tiny_tokenizer()
    assert len(found.explained) == 3 and {(one.reference, one.kl, one.likeness) for one in found.explained} == {(None,) * 3}
    windows = tokens_from_text(open_checkpoint(tiny_model(family)), [tmp_path / "t.txt"], tokens=128, length=64, seed=0)
    with torch.no_grad():
        logp_nTV = model(input_ids=windows).logits.log_softmax(-1)
    shift = family == "llama"
    nll_nT = -logp_nTV[:, : 64 - shift].gather(2, windows[:, shift:, None])[..., 0]
    window, at = divmod(int(nll_nT[:, 12:].argmax()), 52 - shift)  # what has too few tokens before it is left out
    worst = tokenizer.decode(windows[window, at + 12 + shift])
    assert worst in [one.true for one in found.explained]
    nll = []
    for one in found.explained:
        ids = tokenizer("".join(one.tokens), return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert len(ids[0]) == len(one.tokens)
        place = -1 if family == "llama" else next(place for place, token in enumerate(one.tokens) if token == one.true)
        with torch.no_grad():
            logp_V = model(input_ids=ids).logits[0, place].log_softmax(-1)
        if family == "llama":
            assert tokenizer.decode(logp_V.argmax()) == one.target == one.model.top
            assert one.model.log_p == pytest.approx(float(logp_V.max()), abs=1e-4)
            nll.append(-float(logp_V[tokenizer.convert_tokens_to_ids(tokenizer.tokenize(one.true))]))
    assert nll == sorted(nll, reverse=True)


def test_hostile_tokens_stay_on_their_line() -> None:
    side = Side("\x1b[31mred\n", -1.0, [0.5, -2.0], {})
    one = Explained(["\x1b[2J", "a\nb"], "x", "\x07" * 3, side, replace(side, top="y" * 99), 0.1, 1.0)
    for text in (answered(one), weighed(one), weighed(replace(one, reference=None))):
        assert text.isprintable() and len(text) < 160, text
    assert weighed(replace(one, reference=None)) == r"a\nb -2.00, \x1b[2J +0.50"
    assert answered(one).startswith(r"right '\x07\x07\x07', original 'yyyy")


def test_long_texts_are_explained_in_stretches() -> None:
    tokenizer = tiny_tokenizer()
    ids = (tokenizer("The river moves the stone. Ein Tür ist schön. " * 20)["input_ids"])[:300]
    parts, texts = parted(ids, tokenizer)
    assert parts == sorted(parts) and len(texts) == parts[-1] + 1 <= module.PARTS + 1
    assert "".join(texts) == tokenizer.decode(ids)
    parts, texts = parted(ids, tokenizer, {0, 1, 50, 51, 52})
    assert all(parts.count(parts[place]) == 1 for place in (0, 1, 50, 51, 52)) and len(texts) <= module.PARTS + 8
    sizes = [parts.count(part) for part in range(len(texts))]
    assert max(sizes) == 11 and sum(size == 1 for size in sizes) >= 5  # 295 tokens in 27 stretches
    assert parted(ids, tokenizer, set(range(40))) == parted(ids, tokenizer)
    assert parted(ids[:64], tokenizer)[0] == list(range(64))
