"""Pairs of texts as windows, for models that read one text and write another.

A pair is one row of tokens; a set of pairs is padded on both sides:

    s_1 .. s_m PADDING .. EDGE start y_1 .. y_k end PADDING ..

The encoder reads what stands before the edge. The decoder reads what stands behind it and says at each token the next one,
which makes k + 1 answers. PADDING and EDGE are no tokens: nobody attends to them and no mean counts them. The two sides of a
set differ in length, so that the length of a layer's input tells which of them it is.

Windows of one text have no edge: all of it is written, every position answers, and the functions here say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PADDING, EDGE = -1, -2


def reads_pairs(checkpoint: Any) -> bool:
    """Whether the model reads one text and writes another."""
    return bool(getattr(checkpoint.config, "is_encoder_decoder", False))


def join(sources: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> Tensor:
    """Windows (N, T) int64 of N sources and what is written of them, start and end included."""
    read, most = max(map(len, sources)), max(map(len, written))
    read += read + 1 == most  # the edge is a position of the encoder's
    rows = [[*one, *[PADDING] * (read - len(one)), EDGE, *other, *[PADDING] * (most - len(other))]
            for one, other in zip(sources, written, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


def begin(windows_NT: Tensor) -> int:
    """The position at which the text that is written begins; 0 in windows of one text."""
    return int((windows_NT[0] == EDGE).int().argmax()) + 1 if bool((windows_NT[0] == EDGE).any()) else 0


def written(window_T: Tensor) -> Tensor:
    """The tokens (W,) that are written, of one window."""
    tokens_W = window_T[begin(window_T[None]):]
    return tokens_W[tokens_W >= 0]


def answering(windows_NT: Tensor) -> Tensor:
    """(N, T) bool: the positions whose answers count. Behind the last token of a pair nothing is said."""
    start = begin(windows_NT)
    if not start:
        return torch.ones_like(windows_NT, dtype=torch.bool)
    found_NT = torch.zeros_like(windows_NT, dtype=torch.bool)
    found_NT[:, start:-1] = windows_NT[:, start + 1:] >= 0
    return found_NT


def bare(window_T: Tensor) -> list[int]:
    """One window without its padding."""
    found: list[int] = window_T[window_T != PADDING].tolist()
    return found


def count(windows_NT: Tensor) -> int:
    """Tokens in the windows."""
    return int((windows_NT >= 0).sum())


def inputs(windows_NT: Tensor) -> dict[str, Tensor]:
    """What a Transformers model is called with."""
    start = begin(windows_NT)
    if not start:
        return {"input_ids": windows_NT}
    read_NT, written_NT = windows_NT[:, :start], windows_NT[:, start:]
    return {"input_ids": read_NT.clamp(min=0), "attention_mask": (read_NT >= 0).long(),
            "decoder_input_ids": written_NT.clamp(min=0), "decoder_attention_mask": (written_NT >= 0).long()}
