"""The information limit as it is reported: numbers with their kind, a row a layer, and the assumptions they rest on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .entropy import Lossless
from .information import ENOUGH, Curve, LayerSpectrum
from .shaping import FormatGap, format_gaps
from .values import Value

KLS = (0.01, 0.05, 0.1)  # nats per token
BITS = (2.0, 3.0, 4.0)  # per weight
TRUSTED_KL = 0.2  # beyond it the second order overstates what a change does


@dataclass(frozen=True)
class LayerLimit:
    """One layer at the water level at which the whole model has KL 0.05."""

    name: str
    shape: tuple[int, int]
    bits: float  # least bits per weight (bound)
    kl_share: float  # of the model's KL (bound)
    mean_diagonal: float  # mean S_ii
    mean_pivot: float  # mean L_ii^2
    geometric_mean: float  # |S|^(1/I)
    gaps: dict[str, float]  # predicted high-rate gap of each algorithm, entropy-coded, bits per weight (estimate)
    tokens: int
    shrunk: float
    bias_bits: float
    negentropy: float  # bits per weight (estimate)


@dataclass(frozen=True)
class InformationLimit:
    """What can be known about the size of a checkpoint before compressing it."""

    weights: int  # that the curve covers
    bits_at_kl: dict[str, Value]
    kl_at_bits: dict[str, Value]
    curve: tuple[tuple[float, float], ...]  # (bits per weight, KL nats per token), ascending in bits (bound)
    high_rate: Value | None  # c in KL_min(R) = 2^(c - 2 R)
    layers: tuple[LayerLimit, ...]
    stored: Value | None
    lossless: Value | None
    gap_of_file: dict[str, Value]  # bits per weight that the file as it is spends above a limit
    formats: tuple[FormatGap, ...]
    assumptions: tuple[str, ...]


def layer_rows(curve: Curve, kl: float = 0.05) -> tuple[LayerLimit, ...]:
    """One row a layer, at the water level where the model's KL is `kl`."""
    level = curve.level_at_kl(kl)
    shares = curve.layer_kl(level)
    out: list[LayerLimit] = []
    for layer, bits, share in zip(curve.layers, curve.layer_bits(level), shares, strict=True):
        own = layer.numbers
        three = (own.mean_diagonal, own.mean_pivot, own.geometric_mean) if own else (math.nan,) * 3
        gaps = own.gaps() if own else {}
        out.append(LayerLimit(layer.name, layer.shape_OI, bits, share / sum(shares), *three, gaps,
                              layer.tokens, layer.shrunk, layer.bias_bits, layer.negentropy))  # fmt: skip
    return tuple(out)


def assumptions(curve: Curve) -> tuple[str, ...]:
    """What the curve takes for granted, with this run's own figures."""
    layers = curve.layers
    said = [
        f"bounds editing this checkpoint's {len(layers)} matrices ({curve.weights:,} weights) without retraining",
        "weights Gaussian with a variance for each row and column; KL to second order, each layer by itself (K-FAC)"
        if all(layer.row_profile_O is not None for layer in layers)
        else "weights Gaussian with one variance a layer; KL to second order, each layer by itself (K-FAC)",
        f"trusted to KL {TRUSTED_KL:g}; beyond, the second order overstates the damage",
    ]
    fewest = min(layers, key=lambda layer: layer.tokens / layer.shape_OI[1])
    said.append(
        f"statistics of at least {fewest.tokens / fewest.shape_OI[1]:.1f} tokens an input feature ({fewest.name});"
        f" {ENOUGH} are enough"
    )
    shrunk = [layer for layer in layers if layer.shrunk]
    if shrunk:
        most = max(layer.shrunk for layer in shrunk)
        said.append(f"S of {len(shrunk)} layers mixed with up to {most:.2g} of its mean diagonal (too few tokens)")
    bias = sum(layer.weights * layer.bias_bits for layer in layers if not layer.shrunk) / curve.weights
    if math.isfinite(bias) and bias > 0.005:
        said.append(f"S from so many tokens reads {bias:.2f} bit too low on the mean; not corrected")
    easier = sum(layer.weights * layer.negentropy for layer in layers) / curve.weights
    said.append(f"the weights are {max(0.0, easier):.3f} bit easier than Gaussian ones (negentropy); not subtracted")
    diagonal = sum(not layer.exact_output for layer in layers)
    if diagonal:
        said.append(f"output Fisher of {diagonal} layers by its diagonal, which can only overstate their bits")
    return tuple(said)


def _gap_of_file(
    curve: Curve | None, lossless: Lossless | None, stored_bits: float | None, reached: tuple[float, float] | None
) -> dict[str, Value]:
    gaps: dict[str, Value] = {}
    if lossless:
        saved = lossless.stored_bits - lossless.lossless_bits
        gaps["lossless"] = Value(saved, "bits/weight", "measured", "stored, less an adaptive code of the same weights")
    if stored_bits is not None and curve:
        for kl in KLS:
            gap = stored_bits - curve.bits_at_kl(kl)
            gaps[f"KL {kl:g}"] = Value(gap, "bits/weight", "bound", f"no code of KL {kl:g} saves more than this")
    if curve and reached and reached[1] > 0:
        gap = curve.gap_bits(*reached)
        note = f"measured {reached[0]:.3f} bits at KL {reached[1]:.4f}, less the bound at that KL"
        gaps["reached"] = Value(gap, "bits/weight", "estimate", note)
    return gaps


def information(
    layers: Iterable[LayerSpectrum] = (),
    *,
    lossless: Lossless | None = None,
    stored_bits: float | None = None,
    reached: tuple[float, float] | None = None,
) -> InformationLimit:
    """Assemble the report. `stored_bits`: per weight of these layers, as the file has them. `reached`: (bits per
    weight, measured KL) of a compressed file, to place it beside the curve."""
    layers = tuple(layers)
    curve = Curve(layers) if layers else None

    def damage(bits: float) -> Value:
        assert curve is not None
        kl = curve.kl_at_bits(bits)
        note = "" if kl <= TRUSTED_KL else f"beyond the second order (KL > {TRUSTED_KL:g})"
        return Value(kl, "nats/token", "bound", note)

    constant = curve.high_rate_constant() if curve else -math.inf
    note = "adaptive code, its tables included"
    if lossless and lossless.skipped:
        note += f"; {', '.join(lossless.skipped)} counted as stored"
    return InformationLimit(
        weights=curve.weights if curve else 0,
        bits_at_kl={f"{kl:g}": Value(curve.bits_at_kl(kl), "bits/weight", "bound") for kl in KLS} if curve else {},
        kl_at_bits={f"{bits:g}": damage(bits) for bits in BITS} if curve else {},
        curve=tuple(curve.sample()) if curve else (),
        high_rate=Value(constant, "log2 nats/token", "bound", "c in KL_min(R) = 2^(c - 2 R), no component under water")
        if math.isfinite(constant)
        else None,
        layers=layer_rows(curve) if curve else (),
        stored=Value(lossless.stored_bits, "bits/weight", "measured") if lossless else None,
        lossless=Value(lossless.lossless_bits, "bits/weight", "measured", note) if lossless else None,
        gap_of_file=_gap_of_file(curve, lossless, stored_bits, reached),
        formats=format_gaps(),
        assumptions=assumptions(curve) if curve else (),
    )  # fmt: skip
