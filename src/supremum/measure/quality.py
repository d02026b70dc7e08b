"""Quality of a model, alone or against the original it was made from, on held-out windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.architecture import objective
from ..errors import SupremumError
from ..progress import phase
from ..text import self_generated, tokens_from_text
from .answers import Answers, score
from .cache import KIVI, CacheQuality, cache_bytes, evaluate_cache
from .encoders import EncoderQuality, compare_pooled, pooled
from .scores import Quality, summarise


def evaluate(checkpoint: Any, reference: Any | None, windows: Tensor, *,
             dtype: torch.dtype = torch.float32) -> Quality | EncoderQuality:
    """Score `checkpoint` on windows (n, T) int64, against the Checkpoint `reference`.

    Decoders and encoders with a masked-language head give Quality (the latter's targets are the tokens themselves);
    headless encoders, which need a reference, give EncoderQuality. Both models compute in `dtype`; scores are float32.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ValueError(f"windows must be (n, T), not {tuple(windows.shape)}")
    _same_vocabulary(checkpoint, reference)
    model = checkpoint.model(dtype)
    if objective(type(model).__name__) == "none":
        return _evaluate_encoder(model, reference, windows, dtype)
    answers = Answers(model, windows)
    original = Answers(reference.model(dtype), windows) if reference is not None else None
    if original is not None and original.objective != answers.objective:
        raise SupremumError(f"The reference is a {type(original.model).__name__}, the candidate a "
                            f"{type(model).__name__}.", "Compare a model with its own original.")
    scores = []
    with phase("evaluate", len(windows)) as advance:
        for index in range(len(windows)):
            scores.append(score(answers, original, index))
            advance()
    return summarise(scores, objective=answers.objective)


def evaluate_cache_files(model: str | Path, reference: str | Path | None, types: tuple[str, str], *,
                         text: Sequence[str | Path] | None, tokens: int, length: int, seed: int) -> CacheQuality:
    """`supremum evaluate --cache`: open the models, get windows as `evaluate_files` does, and measure the cache."""
    from ..checkpoint import open_checkpoint

    if types[0] in KIVI and reference is not None:
        raise SupremumError(f"{types[0]} is measured against the same model with an exact cache.", "Leave out --reference.")
    candidate = open_checkpoint(model)
    original = open_checkpoint(reference) if reference is not None else None
    _same_vocabulary(candidate, original)
    if types[0] not in KIVI:
        cache_bytes(candidate.config, types, length)  # before the long work
    return evaluate_cache(candidate, original, _windows(original or candidate, text, tokens, length, seed), types)


def _windows(source: Any, text: Sequence[str | Path] | None, tokens: int, length: int, seed: int) -> Tensor:
    """Windows (n, T) of the text, or of what the model writes."""
    return tokens_from_text(source, text, tokens=tokens, length=length, seed=seed) if text else \
        self_generated(source, tokens=tokens, length=length, seed=seed)


def evaluate_files(model: str | Path, reference: str | Path | None = None, *,
                   text: Sequence[str | Path] | None = None, tokens: int = 16384, length: int = 1024,
                   dtype: torch.dtype | str = torch.float32, seed: int = 0) -> Quality | EncoderQuality:
    """`supremum evaluate`: open the models, cut `text` into windows with the reference's tokenizer, and score.

    Without text the reference writes it itself, so that KL is the expectation over its own distribution. Raises
    SupremumError when the models' vocabularies differ, the text is too short or the windows exceed the context.
    """
    from ..checkpoint import open_checkpoint

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise SupremumError(f"{dtype} is not a type that models compute in.", "Use float32, bfloat16 or float16.")
    candidate = open_checkpoint(model)
    original = open_checkpoint(reference) if reference is not None else None
    _same_vocabulary(candidate, original)
    return evaluate(candidate, original, _windows(original or candidate, text, tokens, length, seed), dtype=kind)


def _evaluate_encoder(model: Any, reference: Any, windows: Tensor, dtype: torch.dtype) -> EncoderQuality:
    if reference is None:
        raise SupremumError(f"A {type(model).__name__} predicts no tokens, so it has no quality by itself.",
                            "Name the original with --reference.")
    with phase("evaluate"):
        candidate = pooled(model, windows)
        original = pooled(reference.model(dtype), windows)
        return compare_pooled(original, candidate, length=windows.shape[1])


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
