"""What is possible before anything is changed: the machine's limit and the information limit of a model (`limits`).

The laws of training runs, one's own or published, are in `statistical`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..plain import plain
from .constants import Constants, constants
from .entropy import Lossless, lossless
from .hardware import Machine, measure
from .information import Curve, LayerSpectrum, Metric, metric, spectrum
from .page import render
from .roofline import Format, HardwareLimit, formats, hardware_limit, workload
from .summary import InformationLimit, information
from .values import Value


@dataclass(frozen=True)
class Limits:
    """Everything that `supremum limit` prints."""

    source: str
    format: str
    weights: int
    stored_bytes: int
    hardware: HardwareLimit
    information: InformationLimit

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: dictionaries, lists, strings and finite numbers."""
        return dict(plain(self))


def limits(
    checkpoint: Any,
    statistics: Iterable[LayerSpectrum] | None = None,
    *,
    machine: Machine | None = None,
    reached: tuple[float, float] | None = None,
) -> Limits:
    """The limits of an opened checkpoint on this machine.

    `statistics`: a LayerSpectrum a layer, from the sweep; without them only the machine and the lossless size are told.
    `machine`: an earlier measurement, else it is measured now (seconds). `reached`: (bits per weight, KL) of this file
    against the model it was made from, which places it beside the curve.
    """
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    entropy = lossless(checkpoint)
    work = workload(checkpoint.config, checkpoint.skeleton())
    kinds = formats()
    if all(abs(kind.bits - entropy.stored_bits) > 0.01 * kind.bits for kind in kinds):
        like = min(kinds, key=lambda kind: abs(kind.bits - entropy.stored_bits))
        kinds = sorted([*kinds, Format("as stored", entropy.stored_bits, like.dtypes)], key=lambda kind: -kind.bits)
    machine = machine or measure("cuda" if torch.cuda.is_available() else "cpu")
    physical = hardware_limit(work, machine, kinds=kinds)
    layers = tuple(statistics or ())
    names = {layer.name for layer in layers}
    covered = [info for name, info in checkpoint.tensors.items() if name in names]
    weights = sum(math.prod(info.shape) for info in covered)
    bits = 8 * sum(info.nbytes for info in covered) / weights if covered else None
    return Limits(
        checkpoint.source, checkpoint.format, entropy.weights, stored, physical,
        information(layers, lossless=entropy, stored_bits=bits, reached=reached),
    )  # fmt: skip


__all__ = [
    "Constants",
    "Curve",
    "HardwareLimit",
    "InformationLimit",
    "LayerSpectrum",
    "Limits",
    "Lossless",
    "Machine",
    "Metric",
    "Value",
    "constants",
    "hardware_limit",
    "information",
    "limits",
    "lossless",
    "measure",
    "metric",
    "render",
    "spectrum",
]
