"""Quality of a model that is run block by block: for plans that are not written yet, and models larger than memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checkpoint.architecture import objective
from ..progress import phase
from ..stats.streaming import BlockStream
from ..stats.sweep import batches, run_block
from ..text.pairs import answering, written
from .scores import Comparison, Quality, feature_kl, summarise_features

Replaced = Callable[[str], Tensor | None]  # tensor name -> weight (O, I) to use instead, or None
CodecOf = Callable[[str], str | None]  # tensor name -> its codec, which may round the layer's inputs too


@contextlib.contextmanager
def replacing(stream: BlockStream, replaced: Replaced, codec: CodecOf = lambda name: None) -> Iterator[None]:
    """Within the context the stream's model has these weights, and rounds inputs as these codecs do."""
    previous = stream.replaced, stream.codec
    stream.replaced, stream.codec = replaced, codec
    try:
        yield
    finally:
        stream.replaced, stream.codec = previous


def final_hidden(stream: BlockStream, windows_NT: Tensor) -> Tensor:
    """Hidden states (N, T, d) after the last block."""
    hidden_NTd = torch.cat([stream.embed(windows_NT[part]) for part in batches(windows_NT)])
    for call in stream.calls(windows_NT):
        with stream.block(call.block) as block:
            hidden_NTd = run_block(block, call, hidden_NTd)
    return hidden_NTd


def streamed_quality(stream: BlockStream, windows_NT: Tensor, reference_NTd: Tensor, replaced: Replaced,
                     name: str = "measure", codec: CodecOf = lambda name: None) -> Quality:
    """KL and perplexity of the model with replaced weights; `reference_NTd`: the original's `final_hidden`."""
    with phase(name), replacing(stream, replaced, codec), torch.no_grad():
        candidate_NTd = final_hidden(stream, windows_NT)
        if objective(type(stream.model).__name__) == "none":
            return summarise_features(_features(stream, reference_NTd, candidate_NTd))
        return _compared(stream, windows_NT, reference_NTd, candidate_NTd).quality()


def window_kl(stream: BlockStream, windows_NT: Tensor, reference_NTd: Tensor, candidate_NTd: Tensor) -> Tensor:
    """KL (N,) of each window over the windows' mean length, float64: their mean is that over all tokens. `candidate_NTd`:
    hidden states after the last block. Whatever the stream has replaced in its head counts."""
    if objective(type(stream.model).__name__) == "none":
        found = _features(stream, reference_NTd, candidate_NTd)
    else:
        scores = _compared(stream, windows_NT, reference_NTd, candidate_NTd).scores
        found = [score.kl for score in scores if score.kl is not None]
    return torch.stack([kl_T.double().sum() for kl_T in found]) * len(found) / sum(map(len, found))


def _compared(stream: BlockStream, windows_NT: Tensor, reference_NTd: Tensor, candidate_NTd: Tensor) -> Comparison:
    original = BlockStream(stream.checkpoint, dtype=stream.dtype)
    goal = objective(type(stream.model).__name__)
    comparison = Comparison(goal)
    with original.head() as head_p, stream.head() as head_q:
        for n, answer_T in enumerate(answering(windows_NT)):
            targets_T = written(windows_NT[n])[1:] if goal == "next" else windows_NT[n]
            p_TV, q_TV = head_p(reference_NTd[n:n + 1, answer_T])[0], head_q(candidate_NTd[n:n + 1, answer_T])[0]
            comparison.add(p_TV[:len(targets_T)], q_TV[:len(targets_T)], targets_T)
    return comparison


def _features(stream: BlockStream, reference_NTd: Tensor, candidate_NTd: Tensor) -> list[Tensor]:
    """Of a model that ends in hidden states: `feature_kl` of each window under the variance of the original's features."""
    original = BlockStream(stream.checkpoint, dtype=stream.dtype)
    with original.head() as head_p, stream.head() as head_q:
        p_NTD = torch.cat([head_p(reference_NTd[part]) for part in batches(reference_NTd)]).float()
        variance_D = p_NTD.flatten(0, 1).var(0, unbiased=False)
        return [feature_kl(p_TD, head_q(candidate_NTd[n:n + 1])[0], variance_D) for n, p_TD in enumerate(p_NTD)]
