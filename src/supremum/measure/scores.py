"""How far a model's answers lie from another's, token by token.

At position t the reference predicts p and the candidate q over the next token; y is the token that follows.

    KL_t  = sum_v p_v (log p_v - log q_v)          nats; 0 exactly when the answers agree
    nll_t = -log q_y,  perplexity = exp(mean nll)
    same_t = argmax p == argmax q

Standard errors are over windows: tokens of one window are not independent. The figures are those of llama.cpp's
perplexity tool (`--kl-divergence`); quantiles are exact, over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SupremumError

Rows = Callable[[slice], Tensor]  # logits (n, V) of a slice of positions
COMPARED = ("perplexity_reference", "perplexity_reference_se", "excess_nll", "excess_nll_se", "kl_mean", "kl_se",
            "kl_median", "kl_p99", "kl_max", "same_top", "same_top_se")  # what a Quality has only beside a reference
ELEMENTS = 1 << 22  # logits that a source is asked for at one time: enough rows for its matrix product to be fast
CACHED = 1 << 16  # of these, what is in float32 at one time: 256 KiB, which the CPU's caches hold


@dataclass(frozen=True)
class TokenScores:
    """One window's scores per position (T,): nll in nats, float32; the others are None without a reference."""

    nll: Tensor
    nll_reference: Tensor | None = None
    kl: Tensor | None = None
    same: Tensor | None = None  # bool
    top: Tensor | None = None  # the likeliest token, int64, and its probability; asked for with `tops`
    confidence: Tensor | None = None
    top_reference: Tensor | None = None
    confidence_reference: Tensor | None = None


@dataclass(frozen=True)
class Quality:
    """A language model's quality on held-out windows; KL in nats per token, `same_top` a fraction.

    What needs a reference is None without one, and standard errors are None for a single window. `excess_nll` is the
    mean of nll - nll_reference in nats, with the standard error of the paired difference. `objective` says what was
    predicted: the "next" token, "every" token from the whole unmasked window (encoders with a masked-language head), or
    "none": hidden states only, which have no perplexity and no top token; their KL is `feature_kl`.
    """

    perplexity: float | None
    perplexity_se: float | None
    perplexity_reference: float | None
    perplexity_reference_se: float | None
    excess_nll: float | None
    excess_nll_se: float | None
    kl_mean: float | None
    kl_se: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_max: float | None
    same_top: float | None
    same_top_se: float | None
    tokens: int
    windows: int
    objective: str = "next"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def compare(reference: Tensor | Rows | None, candidate: Tensor | Rows, targets: Tensor, *, tops: bool = False) -> TokenScores:
    """Score one window: targets (T,) int64 against logits (T, V), given whole or as a function of a slice of positions.

    All arithmetic is float32, over a block of positions at a time, so that memory does not grow with T x V. Logits
    beyond the reference's vocabulary (padding) are ignored. `tops`: both models' likeliest tokens, too.
    Raises SupremumError when answers are not finite.
    """
    nll, nll_reference, kl, same = [], [], [], []
    best: list[tuple[Tensor, Tensor]] = []  # (log probability, token) of the likeliest
    best_reference: list[tuple[Tensor, Tensor]] = []
    for rows in _blocks(candidate, len(targets)):
        target_rows, q_rows = targets[rows, None], _logits(candidate, rows)
        p_rows = _logits(reference, rows) if reference is not None else None
        width = q_rows.shape[-1] if p_rows is None else p_rows.shape[-1]
        if q_rows.shape[-1] < width:
            raise SupremumError(f"The candidate predicts {q_rows.shape[-1]} tokens, its reference {width}.",
                                "Compare models that share one vocabulary.")
        for part in _slices(len(q_rows), max(1, CACHED // width)):
            logq = q_rows[part, :width].float()
            target = target_rows[part].to(logq.device)
            if p_rows is None:
                logq = torch.log_softmax(logq, -1)
                nll.append(-logq.gather(1, target)[:, 0])
                if tops:
                    best.append(logq.max(-1))
                continue
            logp = p_rows[part].to(logq.device).float()
            same.append(logp.argmax(-1) == logq.argmax(-1))
            logp, logq = torch.log_softmax(logp, -1), torch.log_softmax(logq, -1)
            nll.append(-logq.gather(1, target)[:, 0])
            nll_reference.append(-logp.gather(1, target)[:, 0])
            if tops:
                best.append(logq.max(-1))
                best_reference.append(logp.max(-1))
            difference = torch.sub(logp, logq, out=logq)
            p = logp.exp_()
            if not torch.isfinite(mean := torch.linalg.vecdot(p, difference)).all():
                mean = torch.where(p > 0, p * difference, 0.0).sum(-1)  # a token that p rules out costs nothing
            kl.append(mean)
    beside = [torch.cat(part).cpu() if part else None for part in (nll_reference, kl, same)]
    (top, confidence), (top_reference, confidence_reference) = _tops(best), _tops(best_reference)
    scores = TokenScores(torch.cat(nll).cpu(), beside[0], beside[1], beside[2], top, confidence, top_reference,
                         confidence_reference)
    for name, values in (("model", scores.nll), ("reference", scores.nll_reference), ("model", scores.kl)):
        if values is not None and not torch.isfinite(values).all():
            raise SupremumError(f"The {name}'s answers are not finite ({int((~torch.isfinite(values)).sum())} of "
                                f"{len(values)} positions).", "Evaluate in float32, or look for broken weights.")
    return scores


def _tops(best: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """(tokens, probabilities) of all blocks."""
    if not best:
        return None, None
    return torch.cat([token for _, token in best]).cpu(), torch.cat([logp for logp, _ in best]).exp().cpu()


def _logits(source: Tensor | Rows, rows: slice) -> Tensor:
    return source[rows] if isinstance(source, Tensor) else source(rows)


def _blocks(source: Tensor | Rows, length: int) -> list[slice]:
    width = source.shape[-1] if isinstance(source, Tensor) else source(slice(0, 1)).shape[-1]
    return _slices(length, max(1, ELEMENTS // width))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class Comparison:
    """Scores of windows as they come; `quality()` summarises those so far."""

    def __init__(self, objective: str = "next") -> None:
        self.objective = objective
        self.scores: list[TokenScores] = []

    def add(self, reference: Tensor | Rows | None, candidate: Tensor | Rows, targets: Tensor) -> TokenScores:
        """Score one window as `compare` does, and keep it."""
        self.scores.append(compare(reference, candidate, targets))
        return self.scores[-1]

    def quality(self) -> Quality:
        return summarise(self.scores, objective=self.objective)


def summarise(scores: Iterable[TokenScores], *, objective: str = "next") -> Quality:
    """Means over tokens, standard errors over windows, exact quantiles. One TokenScores a window."""
    scores = list(scores)
    if not scores:
        raise ValueError("no windows were scored")
    nll, nll_se = _mean([s.nll for s in scores])
    count = sum(len(s.nll) for s in scores)
    perplexity = _exp(nll)
    nothing: dict[str, Any] = dict.fromkeys(COMPARED)
    common: dict[str, Any] = dict(perplexity=perplexity, perplexity_se=_times(perplexity, nll_se), tokens=count,
                                  windows=len(scores), objective=objective)
    pairs = [(s.nll, s.nll_reference, s.kl, s.same) for s in scores
             if s.nll_reference is not None and s.kl is not None and s.same is not None]
    if not pairs:
        return Quality(**common, **nothing)
    if len(pairs) != len(scores):
        raise ValueError("some windows were scored without a reference")
    base, base_se = _mean([b for _, b, _, _ in pairs])
    excess, excess_se = _mean([a.double() - b.double() for a, b, _, _ in pairs])
    kl, kl_se = _mean([k for _, _, k, _ in pairs])
    top, top_se = _mean([s for _, _, _, s in pairs])
    every = torch.cat([k for _, _, k, _ in pairs]).numpy()
    median, p99 = np.quantile(every, [0.5, 0.99])
    return Quality(**common, perplexity_reference=_exp(base), perplexity_reference_se=_times(_exp(base), base_se),
                   excess_nll=excess, excess_nll_se=excess_se, kl_mean=kl, kl_se=kl_se, kl_median=float(median),
                   kl_p99=float(p99), kl_max=float(every.max()), same_top=top, same_top_se=top_se)


def feature_kl(reference_TD: Tensor, candidate_TD: Tensor, variance_D: Tensor) -> Tensor:
    """KL (T,) of hidden states read as Gaussians around them with each feature's own variance: 1/2 sum_d (p - q)^2 / v."""
    return 0.5 * ((reference_TD.float() - candidate_TD.float()).square() / variance_D.clamp_min(1e-12)).sum(-1)


def summarise_features(windows: Sequence[Tensor]) -> Quality:
    """`summarise` for models without a vocabulary head: `feature_kl` of each window."""
    if not windows:
        raise ValueError("no windows were scored")
    nothing: dict[str, Any] = dict.fromkeys(COMPARED) | {"perplexity": None, "perplexity_se": None}
    kl, kl_se = _mean(list(windows))
    every = torch.cat(list(windows)).numpy()
    median, p99 = np.quantile(every, [0.5, 0.99])
    found = {"kl_mean": kl, "kl_se": kl_se, "kl_median": float(median), "kl_p99": float(p99), "kl_max": float(every.max())}
    return Quality(**(nothing | found), tokens=len(every), windows=len(windows), objective="none")


def _mean(windows: list[Tensor]) -> tuple[float, float | None]:
    """Mean over all tokens, and its standard error from the spread of the windows' sums about mean x length."""
    sums = torch.stack([w.double().sum() for w in windows])
    lengths = torch.tensor([len(w) for w in windows], dtype=torch.float64)
    mean = float(sums.sum() / lengths.sum())
    spread = (sums - mean * lengths) / lengths.mean()
    return mean, (spread.std() / math.sqrt(len(windows))).item() if len(windows) > 1 else None


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _times(value: float, error: float | None) -> float | None:
    return None if error is None else value * error  # d exp(x) = exp(x) dx
