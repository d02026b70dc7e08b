"""supremum.json put together from what a run found."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__, codecs
from ..allocate import Budget, Option, Unit, frontier
from ..checkpoint.targets import Target
from ..codecs.activations import rounder
from ..gather import Gathered
from ..limits import Curve, Limits
from ..limits.topology import processor_name
from ..plain import plain
from ..planning import Reached, block_rate, reason
from ..progress import peaks, timings
from ..reach import correction
from ..runtime import capabilities
from ..text import fingerprint
from ..versions import version_of
from .document import SCHEMA, Document

PACKAGES = ("torch", "transformers", "gguf", "safetensors", "compressed-tensors", "xllamacpp", "numpy", "scipy")


def assemble(gathered: Gathered, target: Target, budget: Budget, reached: Reached, *, proof: Mapping[str, Any],
             bounds: Limits, written: Path, samples: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any], command: str,
             running: Sequence[Mapping[str, Any]] = (), smoothing: Mapping[str, Any] | None = None,
             floor: Mapping[str, Any] | None = None) -> Document:
    """The whole document. inputs: what makes two runs the same. running: budgets of the running file, in words. smoothing:
    what was folded (solve/smoothing.py). floor: of a task's metric (floor.py)."""
    checkpoint, units, chosen, points, size = gathered.checkpoint, reached.units, reached.chosen, reached.points, reached.size
    measured: Mapping[str, Any] = reached.trained.quality
    block_weights, bits = block_rate(units, chosen)
    fixed = size - sum(option.nbytes for option in chosen)
    curve = Curve(reached.spectra)
    kl = measured.get("kl_mean")
    tables_bytes = fixed + sum(o.nbytes for unit, o in zip(units, chosen, strict=True) if not unit.in_blocks)
    factor = correction(points)
    predicted = factor * sum(option.nats for option in chosen)
    document: Document = plain({
        "schema": SCHEMA, "supremum_version": __version__, "command": command,
        "inputs": {
            "name": _name(checkpoint), "model": checkpoint.source, "format": checkpoint.format,
            "architecture": (checkpoint.config.architectures or ["unknown"])[0], "fingerprint": checkpoint.fingerprint,
            "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
            "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
            "text_fingerprint": fingerprint(gathered.windows), "seed": inputs["seed"], "options": dict(inputs["options"]),
            "state": dict(inputs)},
        "text": gathered.text,
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := version_of(p))},
        "machine": machine(),
        "limits": bounds.to_dict(),
        "budget": asdict(budget),
        "plan": _layers(gathered, units, chosen, curve, kl),
        "frontier": _frontier(units, points, curve, block_weights, fixed, tables_bytes, factor,
                              {"bits": bits, "bytes": size, "kl": kl}),
        "result": {"target": target.name, "file": written.name if written.is_file() else ".", "bytes": size,
                   "budget_bytes": budget.size, "bits_per_weight": bits, "predicted_kl": predicted,
                   "measured": dict(measured), "limit_kl": curve.kl_at_bits(bits),
                   "limit_bits": curve.bits_at_kl(kl) if kl else None,
                   "gap_bits": curve.gap_bits(bits, kl) if kl else None, "running": list(running),
                   "swaps": reached.swaps, "smoothing": smoothing, "gains": reached.trained.record}
        | ({"floor": dict(floor)} if floor else {}),
        "proof": dict(proof),
        "phases": [{"name": name, "seconds": seconds, "peak_rss_mb": peaks.get(name)} for name, seconds in timings.items()],
        "samples": list(samples),
        "assumptions": [*bounds.information.assumptions, *_when_quick(inputs["options"]),
                        *_remarks(target, {option.codec for option in chosen}),
                        *_when_alone(reached.priced), *_when_swapped(reached.swaps), *_when_smoothed(smoothing),
                        *_when_trained(reached.trained.record), *_when_floored(floor)],
    })
    return document


def _remarks(target: Target, chosen: Collection[str | None]) -> list[str]:
    """What a reader of the figures should know of the formats."""
    said, engine = [], capabilities(target.runtime)
    if not engine.compressed:
        said.append(f"Size only: {engine.title} decodes the weights to floats before it computes; the format saves bytes on "
                    "disk, neither memory nor time.")
    if any(rounder(codec) for codec in chosen):
        said.append("Layers whose format ends in -a8 round their inputs to 8 bits a token; the measured KL includes that.")
    return said


def _when_quick(options: Mapping[str, Any]) -> list[str]:
    return ["Made with --quick: every matrix was solved once, for the original's inputs, and nothing was trained; without it "
            "the same bytes do better"] if options.get("quick") else []


def _when_alone(priced: bool) -> list[str]:
    return [] if priced else ["The budget leaves one plan, so no candidate was priced: the layers' damages are those of the "
                              "finished matrices, as predicted and not corrected by a measurement"]


def _when_swapped(swaps: Mapping[str, Any] | None) -> list[str]:
    return [f"{swaps['accepted']} of {swaps['trials']} swaps of formats were accepted by their KL on the held-out text "
            "itself, which flatters the KL reported on it"] if swaps and swaps["accepted"] else []


def _when_smoothed(smoothing: Mapping[str, Any] | None) -> list[str]:
    return ["Norms and weights are scaled against each other so that inputs round better (smoothing): the same function, and "
            "the limit is that of the scaled weights"] if smoothing and any(
                pair["exponent"] is not None for pair in smoothing["pairs"]) else []


def _when_trained(gains: Mapping[str, Any] | None) -> list[str]:
    return ["Norms, biases and scales were trained on the calibration text; the held-out text chose among "
            f"{len(gains['passes']) + 1} states of them"] if gains and gains["kl_after"] < gains["kl_before"] else []


def _when_floored(floor: Mapping[str, Any] | None) -> list[str]:
    if not floor:
        return []
    said = [f"The floor of {floor['metric']} was held against {floor['rows']['valid']} valid rows, on which the file was "
            f"{'chosen' if floor['searched'] else 'checked'}; the test rows had no part in it"]
    if not floor["held_on_test"]:
        said.append(f"On the {floor['rows']['test']} test rows the file is below the floor; a higher floor or more "
                    "valid rows would choose a larger one")
    change = floor["change"]["valid"]
    if floor["original"]["valid"]["value"] + change["low"] < floor["least"]:
        said.append(f"So few rows cannot exclude that the floor is missed: the change of {floor['metric']} on them has a "
                    f"95 % interval from {change['low']:+.4g} to {change['high']:+.4g}")
    return said


def machine() -> dict[str, Any]:
    """The machine, in the words of its own system."""
    import psutil

    return {"cpu": processor_name(), "cores": os.cpu_count() or 1, "ram_bytes": psutil.virtual_memory().total,
            "os": platform.platform(aliased=True, terse=True)}


def _layers(gathered: Gathered, units: Sequence[Unit], chosen: Sequence[Option], curve: Curve, kl: float | None,
            ) -> list[dict[str, Any]]:
    limit = dict(zip((layer.name for layer in curve.layers), curve.layer_bits(curve.level_at_kl(kl)), strict=True)) \
        if kl else {}
    total = sum(option.nats for option in chosen) or 1.0
    rows = []
    for unit, option in zip(units, chosen, strict=True):
        for name in unit.tensors:
            shape = gathered.shapes[name]
            weights = shape[0] * shape[1]
            nbytes = codecs.get(option.codec).nbytes(shape) if len(unit.tensors) > 1 and option.codec else \
                option.nbytes * weights // unit.weights
            nats = option.nats * weights / unit.weights
            rows.append({"name": name, "shape": list(shape), "codec": option.codec or "as it is",
                         "bits_per_weight": 8 * nbytes / weights, "bytes": nbytes, "predicted_nats": nats,
                         "share": nats / total, "reason": reason(unit, option), "limit_bits": limit.get(name),
                         "gap_bits": 8 * nbytes / weights - limit[name] if name in limit else None})
    return rows


def _frontier(units: Sequence[Unit], measured: Sequence[Mapping[str, Any]], curve: Curve, weights: int, fixed: int,
              tables: int, factor: float, reached: Mapping[str, Any]) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []

    def bits(nbytes: float) -> float:
        return 8 * nbytes / max(weights, 1)

    def of_blocks(options: Sequence[Option]) -> int:
        return sum(option.nbytes for unit, option in zip(units, options, strict=True) if unit.in_blocks)

    for rate, kl in curve.sample(low=0.5, high=max(6.0, reached["bits"] + 0.75), step=0.25):
        points.append({"bits": rate, "bytes": int(rate * weights / 8) + tables, "kl": kl, "kind": "limit",
                       "label": "no code of the blocks is below"})
    for options in frontier(units):
        nats = factor * sum(option.nats for option in options)
        if nats > 0:
            points.append({"bits": bits(of_blocks(options)), "bytes": fixed + sum(o.nbytes for o in options), "kl": nats,
                           "kind": "predicted", "label": "plan"})
    for point in measured:
        inner = sum(option.nbytes for unit in units if unit.in_blocks for option in unit.options
                    if option.codec == point["plan"].get(unit.tensors[0]))
        points.append({"bits": bits(inner), "bytes": point["bytes"], "kl": point["kl"], "kind": "measured",
                       "label": "plan, measured before drift correction"})
    if reached["kl"]:
        points.append({**reached, "kind": "measured", "label": "this file"})
    return points


def _name(checkpoint: Any) -> str:
    name = Path(checkpoint.path).name
    return name.removesuffix(".gguf") or checkpoint.source
