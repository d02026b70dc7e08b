"""Quality of a model, alone or against the original it was made from, on held-out windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.architecture import objective
from ..errors import SupremumError
from ..progress import phase
from ..text import self_generated, tokens_from_text
from ..text.pairs import begin, reads_pairs
from ..text.windows import check_one_text, fitting_length
from .answers import Answers, score
from .cache import KIVI, CacheQuality, cache_bytes, evaluate_cache
from .details import Details, details
from .encoders import EncoderQuality, compare_pooled, pooled
from .explain import Explained, check_captum, explain, pieces
from .perturb import check_kinds, perturbed_windows
from .scores import Quality, TokenScores, summarise

LENGTH = 1024  # tokens of a window, unless asked for or the model takes fewer


@dataclass(frozen=True)
class TextQuality:
    """Quality on one text; `details` as in details.py (None for models that predict no tokens); `perturbed`: the same of
    the text with typos and so on, by name; `explained` as in explain.py, where it was asked for."""

    text: str | None
    quality: Quality | EncoderQuality
    details: Details | None = None
    perturbed: dict[str, TextQuality] = field(default_factory=dict)
    explained: list[Explained] = field(default_factory=list)


def evaluate(checkpoint: Any, reference: Any | None, windows: Tensor, *,
             dtype: torch.dtype = torch.float32) -> Quality | EncoderQuality:
    """Score `checkpoint` on windows (n, T) int64, against the Checkpoint `reference`.

    Decoders and encoders with a masked-language head give Quality (the latter's targets are the tokens themselves);
    headless encoders, which need a reference, give EncoderQuality. Both models compute in `dtype`; scores are float32.
    """
    _check(windows)
    model, original = _models(checkpoint, reference, dtype)
    if objective(type(model).__name__) == "none":
        return _evaluate_encoder(model, original, windows)
    return summarise(_score(model, original, windows, "evaluate"), objective=objective(type(model).__name__))


def _check(windows: Tensor) -> None:
    if windows.ndim != 2 or not windows.numel():
        raise ValueError(f"windows must be (n, T), not {tuple(windows.shape)}")


def _models(checkpoint: Any, reference: Any | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its original (None without one), of one kind and one vocabulary."""
    _same_vocabulary(checkpoint, reference)
    model = checkpoint.model(dtype)
    original = reference.model(dtype) if reference is not None else None
    kind = objective(type(model).__name__)
    if original is not None and kind != "none" and objective(type(original).__name__) != kind:
        raise SupremumError(f"The reference is a {type(original).__name__}, the candidate a "
                            f"{type(model).__name__}.", "Compare a model with its own original.")
    return model, original


def _score(model: Any, original: Any | None, windows: Tensor, label: str, *, tops: bool = False) -> list[TokenScores]:
    answers = Answers(model, windows)
    beside = Answers(original, windows) if original is not None else None
    scores = []
    with phase(label, len(windows)) as advance:
        for index in range(len(windows)):
            scores.append(score(answers, beside, index, tops=tops))
            advance()
    return scores


def evaluate_texts(model: str | Path, reference: str | Path | None = None, *, texts: Sequence[str | Path] | None = None,
                   tokens: int = 16384, length: int | None = None, dtype: torch.dtype | str = torch.float32, seed: int = 0,
                   disturb: Sequence[str] = (), explained: int = 0) -> list[TextQuality]:
    """`supremum evaluate`: every text by itself, `tokens` of each, with details; without texts what the reference writes.

    length: tokens of a window; LENGTH unless given, or fewer where the model takes or `tokens` has fewer. disturb: names of
    `perturb.KINDS` under which each text is scored once more. explained: pieces of each text whose answer is explained.
    """
    check_kinds(disturb)
    if explained:
        check_captum()
    candidate, original, kind = _opened(model, reference, dtype)
    if (disturb or explained) and reads_pairs(candidate):
        raise SupremumError(f"{model}: pairs of texts are measured neither disturbed nor explained.",
                            "Leave out --perturb and --explain; by its task a tuned model is measured with both.")
    sources: list[str | None] = [str(text) for text in texts] if texts else [None]
    cut = [_windows(original or candidate, [source] if source else None, tokens, length, seed) for source in sources]
    one, other = _models(candidate, original, kind)  # after the texts were found to be readable
    tokenizer = (original or candidate).tokenizer()
    report = []
    for source, windows in zip(sources, cut, strict=True):
        _check(windows)
        if objective(type(one).__name__) == "none":
            if explained:
                raise SupremumError(f"A {type(one).__name__} predicts no tokens that could be explained.",
                                    "Leave out --explain.")
            report.append(TextQuality(source, _evaluate_encoder(one, other, windows)))
            continue
        label = f"evaluate {Path(source).name}" if source else "evaluate"
        perturbed = {name: _detailed(one, other, perturbed_windows(tokenizer, windows, name, seed), tokenizer, source,
                                     f"{label}, {name}", seed) for name in disturb}
        found = _detailed(one, other, windows, tokenizer, source, label, seed, explained)
        report.append(replace(found, perturbed=perturbed))
    return report


def _detailed(model: Any, original: Any | None, windows: Tensor, tokenizer: Any, source: str | None, label: str,
              seed: int, explained: int = 0) -> TextQuality:
    kind = objective(type(model).__name__)
    scores = _score(model, original, windows, label, tops=True)
    if begin(windows):
        return TextQuality(source, summarise(scores, objective=kind))
    asked = pieces(windows, scores, tokenizer, model, original, count=explained, shift=kind == "next") if explained else []
    return TextQuality(source, summarise(scores, objective=kind),
                       details(scores, windows[:, 1:] if kind == "next" else windows, tokenizer, seed=seed),
                       explained=explain(asked, model, original) if asked else [])


def _opened(model: str | Path, reference: str | Path | None, dtype: torch.dtype | str) -> tuple[Any, Any | None, torch.dtype]:
    from ..checkpoint import open_checkpoint

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise SupremumError(f"{dtype} is not a type that models compute in.", "Use float32, bfloat16 or float16.")
    candidate = open_checkpoint(model)
    original = open_checkpoint(reference) if reference is not None else None
    _same_vocabulary(candidate, original)
    return candidate, original, kind


def evaluate_cache_files(model: str | Path, reference: str | Path | None, types: tuple[str, str], *,
                         text: Sequence[str | Path] | None, tokens: int, length: int | None, seed: int) -> CacheQuality:
    """`supremum evaluate --cache`: open the models, get windows as `evaluate_files` does, and measure the cache."""
    from ..checkpoint import open_checkpoint

    if types[0] in KIVI and reference is not None:
        raise SupremumError(f"{types[0]} is measured against the same model with an exact cache.", "Leave out --reference.")
    candidate = open_checkpoint(model)
    check_one_text(candidate)
    original = open_checkpoint(reference) if reference is not None else None
    _same_vocabulary(candidate, original)
    length = _length(original or candidate, length, tokens)
    if types[0] not in KIVI:
        cache_bytes(candidate.config, types, length)  # before the long work
    return evaluate_cache(candidate, original, _windows(original or candidate, text, tokens, length, seed), types)


def _windows(source: Any, text: Sequence[str | Path] | None, tokens: int, length: int | None, seed: int) -> Tensor:
    """Windows (n, T) of the text, or of what the model writes; of an encoder-decoder, pairs."""
    if reads_pairs(source):
        from ..train.pairs import read_pairs  # which scores what it tunes, by this package

        return read_pairs(source, [str(one) for one in text or []], tokens=tokens, seed=seed)
    length = _length(source, length, tokens)
    return tokens_from_text(source, text, tokens=tokens, length=length, seed=seed) if text else \
        self_generated(source, tokens=tokens, length=length, seed=seed)


def _length(source: Any, length: int | None, tokens: int) -> int:
    """Tokens of a window."""
    return length or min(tokens, fitting_length(source, LENGTH))


def evaluate_files(model: str | Path, reference: str | Path | None = None, *,
                   text: Sequence[str | Path] | None = None, tokens: int = 16384, length: int | None = None,
                   dtype: torch.dtype | str = torch.float32, seed: int = 0) -> Quality | EncoderQuality:
    """One Quality over all of `text`: open the models, cut it into windows with the reference's tokenizer, and score.

    Without text the reference writes it itself, so that KL is the expectation over its own distribution. Raises
    SupremumError when the models' vocabularies differ, the text is too short or the windows exceed the context.
    """
    candidate, original, kind = _opened(model, reference, dtype)
    return evaluate(candidate, original, _windows(original or candidate, text, tokens, length, seed), dtype=kind)


def _evaluate_encoder(model: Any, original: Any | None, windows: Tensor) -> EncoderQuality:
    if original is None:
        raise SupremumError(f"A {type(model).__name__} predicts no tokens, so it has no quality by itself.",
                            "Name the original with --reference.")
    with phase("evaluate"):
        return compare_pooled(pooled(original, windows), pooled(model, windows), length=windows.shape[1])


def _same_vocabulary(candidate: Any, reference: Any | None) -> None:
    if reference is None or candidate is reference:
        return
    one, other = candidate.tokenizer().get_vocab(), reference.tokenizer().get_vocab()
    if one == other:
        return
    differing = sum(one.get(token) != index for token, index in other.items())
    raise SupremumError(
        f"{candidate.source} and {reference.source} have different vocabularies ({len(one)} and {len(other)} tokens, "
        f"{differing} of the reference's differ).", "Token probabilities can only be compared over one vocabulary.")
