"""Two domains in one run: rows of a source beside those of the target, a half batch of each in every step.

    mixed      alpha L(source) + (1 - alpha) L(target)
    reversed   L(source) + C(source, target), C the cross-entropy of a linear domain classifier on the mean of the trunk's
               last hidden states, whose gradient reaches the trunk times -reverse: features that do not tell the domains
               apart (Ganin, Lempitsky 2015, arXiv:1409.7495). Labels of the target's training rows are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .recipe import limits
from .tasks import Task
from .tasks.embed import pool
from .ways import trunk

DOMAIN = "domain"  # name of the domain classifier while it is there


@dataclass(frozen=True)
class Source:
    """Rows of another domain, with the target's labels; its files may have columns and a form of their own."""

    train: tuple[str, ...]
    columns: dict[str, Any] = field(default_factory=dict)  # those of `data` where none are given
    kind: Literal["as data", "auto", "tsv", "csv", "jsonl", "conll", "squad"] = "as data"
    alpha: float = limits(0.5, least=0, most=1)
    reverse: float = limits(0.0, least=0)  # above 0: reversed instead of mixed


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is times -scale."""

    @staticmethod
    def forward(context: Any, values: Tensor, scale: float) -> Tensor:
        context.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return -context.scale * gradients[0], None


def paired(source: Sequence[Any], target: Sequence[Any]) -> list[dict[str, Any]]:
    """Every example of the longer side once, the shorter one repeated."""
    return [{"source": source[n % len(source)], "target": target[n % len(target)]}
            for n in range(max(len(source), len(target)))]


def both(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator of pairs from one of examples."""
    return lambda pairs: {side: dict(collate([pair[side] for pair in pairs])) for side in ("source", "target")}


class Joint:
    """The loss of both domains. Made before the way is prepared, so that an adapter finds the domain classifier in place.
    Reversed, the task has a head of its own (`tune` refuses others)."""

    def __init__(self, task: Task, model: Any, settings: Source) -> None:
        self.task, self.settings = task, settings
        if settings.reverse:
            self.trunk = trunk(model)
            self.domain = nn.Linear(model.config.hidden_size, 2)
            model.add_module(DOMAIN, self.domain)
            self._hidden: list[Tensor] = []
            self._hook = self.trunk.register_forward_hook(lambda module, inputs, output: self._hidden.append(output[0]))

    def loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        source, target = inputs["source"], inputs["target"]
        alpha, reverse = self.settings.alpha, self.settings.reverse
        if not reverse:
            return alpha * self.task.loss(model, source) + (1 - alpha) * self.task.loss(model, target)
        self._hidden.clear()
        masks = [part["attention_mask"] for part in (source, target)]
        loss = self.task.loss(model, source)
        self.trunk(input_ids=target["input_ids"], attention_mask=target["attention_mask"])
        features_BD = torch.cat([pool(hidden_BTD, mask_BT) for hidden_BTD, mask_BT in zip(self._hidden, masks, strict=True)])
        side_B = torch.arange(2, device=features_BD.device).repeat_interleave(
            torch.tensor([len(mask_BT) for mask_BT in masks], device=features_BD.device))
        return loss + nn.functional.cross_entropy(self.domain(Reverse.apply(features_BD, reverse)), side_B)

    def leave(self, model: Any) -> None:
        """Take the domain classifier off again: the result is the task's model alone."""
        if self.settings.reverse:
            self._hook.remove()
            delattr(model, DOMAIN)
