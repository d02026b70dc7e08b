"""Why an answer changed: what each token of a text adds to it, and where the model looks, the original beside this model.

    share_t = f(x) - f(x with x_t replaced by the mean of the embedding table)      f = log p(y | text)

y is the token that the original holds likeliest, x the text's embeddings: occlusion (Zeiler and Fergus 2014,
arXiv:1311.2901), by Captum. Integrated gradients were tried first: with 24 points their sum misses f(x) - f(baseline) by more
than f itself on a Llama of 135 M parameters, whatever the baseline, so nothing is built on them. Shares are of one token at a
time and need not add up. Texts are those pieces of the windows whose last answer has the greatest KL, read by themselves; no
two lie in one stretch. Of a classifier y is the label that the original holds likeliest, x a whole row (`explain_row`).
Attention is the mean over a block's heads: it shows where a block looks, not what it uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import SupremumError
from ..progress import phase
from .scores import TokenScores

CONTEXT = 32  # tokens of a text
BATCH = 8  # texts in a pass, each with another token replaced
LEAST = 12  # tokens before the answer, where the windows have as many
LOOKED = 64  # tokens of the longest row whose attention is shown
TRIED = 4  # candidates for each text: what lies in the window before the piece may have made the change


@dataclass(frozen=True)
class Side:
    """What one model makes of a text: its likeliest token, log p of the target, what each token adds, where it looks."""

    top: str
    log_p: float
    shares: list[float]
    attention: dict[str, list[list[float]]]  # block -> (reading, read) mean over heads; empty where the model gives none


@dataclass(frozen=True)
class Explained:
    """A text whose next answer changed. `target`: the original's likeliest token; `likeness`: cosine of both's shares."""

    tokens: list[str]
    target: str
    kl: float
    likeness: float
    reference: Side
    model: Side


def explain(model: Any, original: Any, windows: Tensor, scores: Sequence[TokenScores], tokenizer: Any, *, texts: int,
            shift: bool) -> list[Explained]:
    """Explanations of `texts` pieces of windows (n, T). shift: the answer behind a token is on the next (decoders); without
    it, on the token itself (encoders that predict tokens)."""
    with phase("explain", texts) as advance:
        found = []
        for ids, place in pieces(model, original, windows, scores, texts, shift):
            found.append(_explained(model, original, ids, place, tokenizer))
            advance()
    return found


def pieces(model: Any, original: Any, windows: Tensor, scores: Sequence[TokenScores], texts: int,
           shift: bool) -> list[tuple[Tensor, int]]:
    """(tokens, place of the answer) of the pieces whose KL, read by themselves, is greatest."""
    kl_nT = torch.stack([one.kl for one in scores if one.kl is not None])
    tried: list[tuple[int, int]] = []
    for flat in kl_nT.flatten().argsort(descending=True).tolist():
        window, at = divmod(flat, kl_nT.shape[1])
        if at >= min(LEAST, kl_nT.shape[1] - 1) and all(window != w or abs(at - a) >= CONTEXT for w, a in tried):
            tried.append((window, at))
        if len(tried) == TRIED * texts:
            break
    cut = []
    for window, at in tried:
        start = max(0, at + 1 - CONTEXT) if shift else max(0, min(at - CONTEXT // 2, windows.shape[1] - CONTEXT))
        end = at + 1 if shift else start + CONTEXT
        ids, place = windows[window, start:end], at - start
        with torch.inference_mode():
            logp, logq = (_answer(one, ids, place) for one in (original, model))
        cut.append((float((logp.exp() * (logp - logq[: len(logp)])).sum()), ids, place))
    cut.sort(key=lambda one: -one[0])
    return [(ids, place) for _, ids, place in cut[:texts]]


def _answer(model: Any, ids: Tensor, place: int) -> Tensor:
    logits: Tensor = model(input_ids=ids[None].to(model.device)).logits[0, place].float()
    return logits.log_softmax(-1).cpu()


def _explained(model: Any, original: Any, ids: Tensor, place: int, tokenizer: Any) -> Explained:
    with torch.inference_mode():
        logp, logq = (_answer(one, ids, place) for one in (original, model))
    target = int(logp.argmax())
    one, other = (_side(side, ids, place, target, log, tokenizer) for side, log in ((original, logp), (model, logq)))
    likeness = torch.cosine_similarity(torch.tensor(one.shares), torch.tensor(other.shares), dim=0)
    return Explained([_shown(tokenizer, index) for index in ids.tolist()], _shown(tokenizer, target),
                     float((logp.exp() * (logp - logq[: len(logp)])).sum()), float(likeness), one, other)


def explain_row(model: Any, original: Any, inputs: Mapping[str, Sequence[int]], labels: Sequence[str],
                tokenizer: Any) -> Explained:
    """Why the label of a row changed. inputs: what the tokenizer gave for it (T,), one list a name."""
    ids, beside = torch.tensor(inputs["input_ids"]), {name: torch.tensor(values)[None] for name, values in inputs.items()
                                                     if name != "input_ids"}

    def log_of(one: Any) -> Tensor:
        with torch.inference_mode():
            rows = {name: row.to(one.device) for name, row in beside.items()}
            found: Tensor = one(input_ids=ids[None].to(one.device), **rows).logits[0].float().log_softmax(-1).cpu()
        return found

    logp_C, logq_C = log_of(original), log_of(model)
    target = int(logp_C.argmax())
    one, other = (Side(labels[int(log_C.argmax())], float(log_C[target]), occluded(side, ids, None, target, beside),
                       attention(side, ids, beside) if len(ids) <= LOOKED else {})
                  for side, log_C in ((original, logp_C), (model, logq_C)))
    likeness = torch.cosine_similarity(torch.tensor(one.shares), torch.tensor(other.shares), dim=0)
    return Explained([_shown(tokenizer, index) for index in ids.tolist()], labels[target],
                     float((logp_C.exp() * (logp_C - logq_C)).sum()), float(likeness), one, other)


def check_captum() -> None:
    """Raises SupremumError where what `occluded` needs is not installed."""
    if not find_spec("captum"):
        raise SupremumError("--explain needs captum, which is not installed.", "pip install 'supremum[explain]'")


def _shown(tokenizer: Any, index: int) -> str:
    text: str = tokenizer.decode([index], clean_up_tokenization_spaces=False)
    return text


def _side(model: Any, ids: Tensor, place: int, target: int, log: Tensor, tokenizer: Any) -> Side:
    return Side(_shown(tokenizer, int(log.argmax())), float(log[target]), occluded(model, ids, place, target),
                attention(model, ids))


@torch.inference_mode()
def occluded(model: Any, ids: Tensor, place: int | None, target: int,
             beside: Mapping[str, Tensor] | None = None) -> list[float]:
    """What each token adds to log p of the target at `place`; of a classifier's label without one. beside: what else the
    model is given (1, T)."""
    check_captum()
    from captum.attr import FeatureAblation

    def log_p(x_BTD: Tensor) -> Tensor:
        more = {name: row.to(x_BTD.device).expand(len(x_BTD), -1) for name, row in (beside or {}).items()}
        logits = model(inputs_embeds=x_BTD, **more).logits
        found: Tensor = (logits if place is None else logits[:, place]).float().log_softmax(-1)[:, target]
        return found

    table = model.get_input_embeddings()
    x_1TD = table(ids[None].to(model.device))
    mean_D = table(torch.arange(table.weight.shape[0], device=model.device)).mean(0)  # as the table gives them: some scale
    each_1T1 = torch.arange(len(ids), device=x_1TD.device)[None, :, None]
    shares_1TD = FeatureAblation(log_p).attribute(x_1TD, baselines=mean_D.expand_as(x_1TD).contiguous(),
                                                  feature_mask=each_1T1, perturbations_per_eval=BATCH)
    found: list[float] = shares_1TD[0, :, 0].tolist()
    return found


@torch.inference_mode()
def attention(model: Any, ids: Tensor, beside: Mapping[str, Tensor] | None = None) -> dict[str, list[list[float]]]:
    """Means over heads of the middle and the last block: row, the token that reads; column, the one that is read."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # others keep no weights
        more = {name: row.to(model.device) for name, row in (beside or {}).items()}
        maps = model(input_ids=ids[None].to(model.device), output_attentions=True, **more).attentions or ()
    except (ValueError, NotImplementedError):  # a model without such attention
        return {}
    finally:
        model.set_attn_implementation(before)
    maps = [one[0].float().mean(0) for one in maps if one is not None and one.shape[-1] == len(ids)]
    chosen = dict.fromkeys((len(maps) // 2, len(maps) - 1)) if maps else {}
    return {f"block {index + 1} of {len(maps)}": [[round(value, 4) for value in row] for row in maps[index].tolist()]
            for index in chosen}
