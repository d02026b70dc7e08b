"""Explanations: shares against single replacements written out, the pieces chosen, attention as Transformers gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from supremum.errors import SupremumError
from supremum.measure import evaluate_texts
from supremum.measure.explain import attention, occluded, pieces
from supremum.measure.scores import TokenScores
from tests.measure.test_evaluate import disturbed


@pytest.mark.parametrize("family, auto", [("llama", AutoModelForCausalLM), ("gemma3", AutoModelForCausalLM),
                                          ("bert", AutoModelForMaskedLM)])
def test_a_share_is_what_one_replacement_takes(family: str, auto: Any, tiny_model: Any) -> None:
    model = auto.from_pretrained(tiny_model(family)).eval()
    ids, place, target = torch.arange(20, 31), 6, 9
    shares = occluded(model, ids, place, target)
    with torch.no_grad():
        table = model.get_input_embeddings()
        whole_VD = table(torch.arange(384))
        for changed in (0, 6, 10):
            x_1TD = table(ids[None]).clone()
            before = model(inputs_embeds=x_1TD).logits[0, place].log_softmax(-1)[target]
            assert torch.allclose(before, model(input_ids=ids[None]).logits[0, place].log_softmax(-1)[target], atol=1e-5)
            x_1TD[0, changed] = whole_VD.mean(0)
            after = model(inputs_embeds=x_1TD).logits[0, place].log_softmax(-1)[target]
            assert shares[changed] == pytest.approx(float(before - after), abs=1e-5)
    if family != "bert":
        assert max(map(abs, shares[7:])) < 1e-6 < abs(shares[6])  # a decoder does not read what comes later


def test_attention_is_the_mean_over_heads_and_the_way_of_computing_it_is_put_back(tiny_model: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    way, ids = model.config._attn_implementation, torch.arange(20, 27)
    found = attention(model, ids)
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
    chosen = pieces(other, one, windows, scores, 8, shift=True)
    ends = {tuple(ids.tolist()) for ids, place in chosen if place == len(ids) - 1 == 31}
    assert tuple(windows[0, 19:51].tolist()) in ends and tuple(windows[1, 59:91].tolist()) in ends
    assert tuple(windows[0, 20:52].tolist()) not in ends


def test_evaluate_explains_what_changed_and_refuses_what_it_cannot(tiny_model: Any, tmp_path: Any) -> None:
    model = disturbed(tiny_model("llama"), tmp_path / "x", 0.5)
    (tmp_path / "t.txt").write_text("The river moves the stone at 3 o'clock, and window 2 waits for letters. " * 12)
    text = [tmp_path / "t.txt"]
    (found,) = evaluate_texts(model, tiny_model("llama"), texts=text, tokens=128, length=64, explained=2)
    assert len(found.explained) == 2
    for one in found.explained:
        assert len(one.tokens) == len(one.model.shares) == len(one.reference.shares) and one.kl > 0
        assert one.reference.top == one.target and -1 <= one.likeness <= 1
    with pytest.raises(SupremumError, match="Name the original"):
        evaluate_texts(model, texts=text, tokens=128, length=64, explained=1)
