"""Why a model answers as it does: what each token that it reads adds, and where it looks; the original beside this model.

    log p = sum over r of log softmax(logits_r)[answer_r]        the answer: a token, a label, a span's two ends, a text
    share_i = log p of what is read - log p with the mean of the embedding table in the place of part i

Occlusion (Zeiler and Fergus 2014, arXiv:1311.2901), by Captum. Integrated gradients were tried first: with 24 points their
sum misses f(x) - f(baseline) by more than f itself on a Llama of 135 M parameters, whatever the baseline, so nothing is built
on them. Shares are of one part at a time and need not add up. A part is a token; of more than LOOKED tokens, a stretch of
them (`parted`), as each part costs a pass. A `Question` says what was read and what was answered: `pieces` asks them of a
text, `train.tasks` of a task's rows. Attention is the mean over a block's heads: it shows where a block looks, not what it
uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import SupremumError
from ..progress import phase
from .scores import TokenScores

CONTEXT = 32  # tokens of a text's piece
TABLE = 1 << 14  # tokens whose embeddings are averaged at a time
BATCH, ROOM = 8, 1024  # the most inputs and tokens in a pass, each input with another part replaced
LEAST = 12  # tokens before the answer, where the windows have as many
LOOKED = 64  # tokens of the longest input of which each is a part, and whose attention is shown
PARTS = 32  # about as many parts have longer ones
TRIED = 4  # candidates for each piece: what lies in the window before it may have made the change


@dataclass(frozen=True)
class Question:
    """What is read and an answer to it. inputs: what a model is called with, (1, ...) each; parts (N,): the part that each of
    the first N tokens of its `input_ids` belongs to, tokens: these parts as text; what follows them is read and stays.
    logits: a model's output -> (B, R, V), answer (R,): the index in V. target, true: the answer and the right one in words;
    says: logits (R, V) -> what is likeliest, in words. written: the answer is a text of R tokens."""

    inputs: Mapping[str, Tensor]
    parts: Sequence[int]
    tokens: Sequence[str]
    logits: Callable[[Any], Tensor]
    answer: Sequence[int]
    target: str
    true: str
    says: Callable[[Tensor], str]
    written: bool = False

    def sure(self, log_p: float) -> float:
        """The answer's probability; of a text the mean log p of its tokens, in nats."""
        return log_p / len(self.answer) if self.written else math.exp(log_p)


@dataclass(frozen=True)
class Side:
    """What one model makes of it: its likeliest answer, log p of the target, what each part adds, where it looks."""

    top: str
    log_p: float
    shares: list[float]
    attention: dict[str, list[list[float]]]  # block -> (reading, read) mean over heads; empty where there is none to show


@dataclass(frozen=True)
class Explained:
    """An answer explained. `target`: the original's, or of a model alone its own; `true`: the right one. Beside an original:
    kl of the two models' answers in nats, the mean over r; likeness, the cosine of their shares."""

    tokens: list[str]
    target: str
    true: str
    model: Side
    reference: Side | None = None
    kl: float | None = None
    likeness: float | None = None


def explain(questions: Sequence[Question], model: Any, original: Any | None = None) -> list[Explained]:
    """Each question's answer by the model and by its original, on tokens that both know."""
    found = []
    with phase("explain", len(questions)) as advance:
        for question in questions:
            found.append(_explained(question, model, original))
            advance()
    return found


def _explained(question: Question, model: Any, original: Any | None) -> Explained:
    logq_RV = log_probabilities(model, question)
    one = Explained(list(question.tokens), question.target, question.true, _side(model, question, logq_RV))
    if original is None:
        return one
    logp_RV = log_probabilities(original, question)
    beside = _side(original, question, logp_RV)
    likeness = torch.cosine_similarity(torch.tensor(beside.shares), torch.tensor(one.model.shares), dim=0)
    return replace(one, reference=beside, kl=_divergence(logp_RV, logq_RV), likeness=float(likeness))


def _side(model: Any, question: Question, logp_RV: Tensor) -> Side:
    return Side(question.says(logp_RV), total(question, logp_RV), shares(model, question), attention(model, question))


@torch.inference_mode()
def log_probabilities(model: Any, question: Question) -> Tensor:
    """(R, V) float32 on the CPU."""
    inputs = {name: row.to(model.device) for name, row in question.inputs.items()}
    return question.logits(model(**inputs))[0].float().log_softmax(-1).cpu()


def total(question: Question, logp_RV: Tensor) -> float:
    """log p of the answer, in nats."""
    return float(logp_RV[range(len(question.answer)), list(question.answer)].sum())


def likeliest(question: Question, model: Any) -> Question:
    """The same question with the model's likeliest answer."""
    logp_RV = log_probabilities(model, question)
    return replace(question, answer=logp_RV.argmax(-1).tolist(), target=question.says(logp_RV))


def _divergence(logp_RV: Tensor, logq_RV: Tensor) -> float:
    return float((logp_RV.exp() * (logp_RV - logq_RV[:, : logp_RV.shape[1]])).sum(-1).mean())


def check_captum() -> None:
    """Raises SupremumError where what `shares` needs is not installed."""
    if not find_spec("captum"):
        raise SupremumError("--explain needs captum, which is not installed.", "pip install 'supremum[explain]'")


def parted(ids: Sequence[int], tokenizer: Any, alone: Collection[int] = ()) -> tuple[list[int], list[str]]:
    """(the part of each token (N,), every part as text). Up to LOOKED tokens each is a part; of more, those at the places
    `alone` (where they are not more than PARTS), and the others in stretches of equal length."""
    if not ids:
        return [], []
    alone = alone if len(alone) <= PARTS else ()
    width = 1 if len(ids) <= LOOKED else math.ceil((len(ids) - len(alone)) / max(PARTS - len(alone), PARTS // 4))
    starts, filled = [], width
    for place in range(len(ids)):
        if place in alone or filled >= width:
            starts.append(place)
            filled = 0
        filled = width if place in alone else filled + 1
    ends = [*starts[1:], len(ids)]
    parts = [part for part, (start, end) in enumerate(zip(starts, ends, strict=True)) for _ in range(start, end)]
    texts, before = [], ""
    for start, end in zip(starts, ends, strict=True):  # what a part adds to the text: alone, some spaces would be lost
        whole = _text(tokenizer, ids[:end])
        whole = whole.rstrip("\N{REPLACEMENT CHARACTER}") if end < len(ids) else whole  # a letter goes where it is whole
        texts.append(whole[len(before):] if whole.startswith(before) else _text(tokenizer, ids[start:end]))
        before = whole
    return parts, texts


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def _has_encoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def pieces(windows: Tensor, scores: Sequence[TokenScores], tokenizer: Any, model: Any, original: Any | None = None, *,
           count: int, shift: bool) -> list[Question]:
    """`count` pieces of windows (n, T), read by themselves, no two in one stretch: those whose last answer has the greatest
    KL to the original, or without one the greatest nll. shift: the answer behind a token is on the next (decoders); without
    it, on the token itself (encoders that predict tokens), in the middle of its piece."""
    worst_nT = torch.stack([one.nll if original is None or one.kl is None else one.kl for one in scores])
    tried: list[tuple[int, int]] = []
    for flat in worst_nT.flatten().argsort(descending=True).tolist():
        window, at = divmod(flat, worst_nT.shape[1])
        if at >= min(LEAST, worst_nT.shape[1] - 1) and all(window != w or abs(at - a) >= CONTEXT for w, a in tried):
            tried.append((window, at))
        if len(tried) == TRIED * count:
            break
    cut = []
    for window, at in tried:
        start = max(0, at + 1 - CONTEXT) if shift else max(0, min(at - CONTEXT // 2, windows.shape[1] - CONTEXT))
        end = at + 1 if shift else start + CONTEXT
        true = int(windows[window, at + shift])
        asked = _piece(windows[window, start:end], at - start, true, tokenizer)
        logq_RV = log_probabilities(model, asked)
        moved = -total(asked, logq_RV) if original is None else _divergence(log_probabilities(original, asked), logq_RV)
        cut.append((moved, asked))
    cut.sort(key=lambda one: -one[0])
    return [likeliest(asked, model if original is None else original) for _, asked in cut[:count]]


def _piece(ids_T: Tensor, place: int, true: int, tokenizer: Any) -> Question:
    """What is said at a place of a text; the answer is what stands there."""
    parts, tokens = parted(ids_T.tolist(), tokenizer)
    word = _text(tokenizer, [true])
    return Question({"input_ids": ids_T[None]}, parts, tokens, lambda output: output.logits[:, place : place + 1], [true],
                    word, word, lambda logits_RV: _text(tokenizer, logits_RV.argmax(-1).tolist()))


@torch.inference_mode()
def shares(model: Any, question: Question) -> list[float]:
    """What each part adds to log p of the answer, in nats. The embedding's output (of an encoder-decoder, the encoder's) is
    changed where it is made, so that the model is called as always."""
    check_captum()
    from captum.attr import FeatureAblation

    device, many = model.device, len(question.parts)
    table = (model.get_encoder() if _has_encoder(model) else model).get_input_embeddings()
    inputs = {name: row.to(device) for name, row in question.inputs.items()}
    place_R, answer_R = torch.arange(len(question.answer), device=device), torch.tensor(question.answer, device=device)

    def log_p(x_BND: Tensor) -> Tensor:
        waiting = [x_BND]

        def put(_: Any, given: Any, out_BTD: Tensor) -> Tensor | None:
            return torch.cat([waiting.pop(), out_BTD[:, many:]], 1) if waiting else None  # later calls are the decoder's

        handle = table.register_forward_hook(put)
        try:
            output = model(**{name: row.expand(len(x_BND), -1) for name, row in inputs.items()})
        finally:
            handle.remove()
        assert not waiting, f"{type(model).__name__} does not read through its embedding"
        return question.logits(output).float().log_softmax(-1)[:, place_R, answer_R].sum(-1)

    x_1ND = table(inputs["input_ids"][:, :many])
    shares_1ND = FeatureAblation(log_p).attribute(
        x_1ND, baselines=_mean(table).expand_as(x_1ND).contiguous(),
        feature_mask=torch.tensor(question.parts, device=device)[None, :, None],
        perturbations_per_eval=max(1, min(BATCH, ROOM // inputs["input_ids"].shape[1])))
    first = [question.parts.index(part) for part in range(len(question.tokens))]
    found: list[float] = shares_1ND[0, first, 0].tolist()
    return found


def _mean(table: Any) -> Tensor:
    """(D,) of the tokens as the table gives them, some of which are scaled."""
    ids_V = torch.arange(table.weight.shape[0], device=table.weight.device)
    total_D: Tensor = torch.stack([table(ids).sum(0) for ids in ids_V.split(TABLE)]).sum(0)
    return total_D / len(ids_V)


@torch.inference_mode()
def attention(model: Any, question: Question) -> dict[str, list[list[float]]]:
    """Means over heads of the middle and the last block (of an encoder-decoder, the encoder's): row, the token that reads;
    column, the one that is read. Empty where parts are no single tokens or more than LOOKED, and of a model without any."""
    many, length = len(question.parts), question.inputs["input_ids"].shape[1]
    if many > LOOKED or many != len(question.tokens):
        return {}
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # others keep no weights
        output = model(output_attentions=True, **{name: row.to(model.device) for name, row in question.inputs.items()})
    except (ValueError, NotImplementedError):  # a model without such attention
        return {}
    finally:
        model.set_attn_implementation(before)
    maps = getattr(output, "encoder_attentions" if _has_encoder(model) else "attentions", None) or ()
    maps = [one[0].float().mean(0)[:many, :many] for one in maps if one is not None and one.shape[-1] == length]
    chosen = dict.fromkeys((len(maps) // 2, len(maps) - 1)) if maps else {}
    return {f"block {index + 1} of {len(maps)}": [[round(value, 4) for value in row] for row in maps[index].tolist()]
            for index in chosen}
