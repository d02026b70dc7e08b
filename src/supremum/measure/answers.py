"""A model's answers on a window, held as its last hidden states: (T, D) instead of (T, V).

The logits of some positions are computed from them through the model's head when they are compared. Whether
head(hidden) is all that the model does to get its logits (some cap or scale them) is checked on every window against
the model's own last position; where it is not, the whole logits of one window at a time are used.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.architecture import objective
from ..text.pairs import bare, begin, inputs, written
from .scores import Rows, TokenScores, compare


class Answers:
    """The answers of `model` on `windows` (n, T) int64, one window computed at a time."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.model, self.windows = model, windows
        self.objective = objective(type(model).__name__)
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._plain = self.objective == "next" and isinstance(self.head, nn.Module) and \
            "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def window(self, index: int) -> Rows:
        """Logits (n, V) of a slice of the window's positions, as a function of the slice; of a pair, of what is written."""
        device = next(self.model.parameters()).device
        if begin(self.windows):
            pair = inputs(torch.tensor([bare(self.windows[index])]))
            found: Tensor = self.model(**{key: value.to(device) for key, value in pair.items()}).logits[0]
            return lambda rows: found[rows]
        ids = self.windows[index:index + 1].to(device)
        if self._plain:
            hidden, last = self._run(ids)
            if torch.allclose(self.head(hidden[-1:]).float(), last.float(), rtol=2e-2, atol=2e-2):
                return self._through_head(hidden)
            self._plain = False
        logits = self.model(input_ids=ids).logits[0]
        return lambda rows: logits[rows]

    def _through_head(self, hidden: Tensor) -> Rows:
        @torch.inference_mode()
        def logits(rows: slice) -> Tensor:
            return self.head(hidden[rows])

        return logits

    def _run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The base model's hidden states (T, D) and the model's own logits (1, V) at the last position."""
        caught: list[Tensor] = []
        base: Any = self.model.base_model
        handle = base.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
        try:
            logits = self.model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0]
        finally:
            handle.remove()
        return caught[0][0], logits


def score(answers: Answers, reference: Answers | None, index: int, *, tops: bool = False) -> TokenScores:
    """Scores of one window: all positions but the last for a decoder, all positions for an encoder's head."""
    window = answers.windows[index]
    targets = written(window)[1:] if answers.objective == "next" else window
    return compare(reference.window(index) if reference is not None else None, answers.window(index), targets,
                   tops=tops)
