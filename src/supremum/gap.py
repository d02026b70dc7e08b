"""How far a finished file is from the limit of the model it was made from, layer by layer, and where the bits go.

With W of the original, dW of the file, S and B gathered on the original (limits/information.py), R(n) the least bits of a set
of layers at n nats and n_l = tr(B dW S dW^T) / 2 what layer l costs, a file of b bits a weight and measured KL k is above the
limit by

    b - R(k) =   mean_l (b_l - R_l(n_l))                   each layer's own gap, in the metric of S and B
               + (mean_l R_l(n_l) - R(sum n))              the same damage, shared out otherwise (one water level)
               + (R(sum n) - R(k'))                        what the sum of the layers' damages misses of the measured KL
               + (R(k') - R(k))                            the embedding and the head: k' is the KL with the original's

and a layer's own gap is

      log2(2 pi e / 12) / 2 = 0.2546                       integers instead of balls; of an archive, what its trellis leaves
    + what error feedback would take off                   by the layer's three numbers, if its error shows none
    + the rest                                             no entropy code, scales, and rows that are treated alike

An error that was fed back is small where S is large: tr(dW S dW^T) is then below tr(dW dW^T) tr(S) / I. Above FED_BACK of
it, none is taken to have been used. Works for every file that opens: ours, a GGUF, compressed-tensors.
Of a file that was smoothed, or whose norms were tuned, the first line alone; an exact copy is held against the entropy of the
stored numbers (limits/entropy.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .checkpoint import Checkpoint
from .checkpoint.safetensors_file import DTYPES
from .codecs.lattice import GAIN
from .errors import SupremumError
from .gather import Gathered, damage
from .limits import Curve, LayerSpectrum
from .limits.entropy import FLOATS, float_bits
from .limits.waterfill import SHAPING_BITS
from .measure.scores import Quality
from .measure.streamed import final_hidden, streamed_quality
from .progress import track
from .stats.sweep import moments

MOVED = 0.05  # of a vector's length: norms that were trained after the codes (solve/gains.py) move less, smoothing more
FED_BACK = 0.6  # of the error that an uncorrelated dW of the same size would make


@dataclass(frozen=True)
class LayerGap:
    """One layer. Bits a weight; nats a token."""

    name: str
    weights: int
    bits: float  # as stored, scales included
    nats: float  # damage by K-FAC alone, as the limit counts it; a file's own report has its prices (prices.py)
    least_bits: float  # of any code of this layer with this damage
    gap: float
    feedback: float  # of the gap, what error feedback would take off; 0 where it seems to have been used
    level_bits: float  # that the layer would have in a file at the limit with this file's KL


@dataclass(frozen=True)
class FileGap:
    """A file against its original. Bits a weight of the layers covered; nats a token. `remark`: why `layers` are empty."""

    model: str
    reference: str
    bits: float
    kl: float
    kl_se: float
    least_bits: float  # of any code at this KL; of an exact copy, of its numbers' entropy
    gap: float
    parts: dict[str, float]  # of the gap, in words; they add up to it
    layers: list[LayerGap]
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gap_of(gathered: Gathered, file: Checkpoint) -> FileGap:
    """Measure `file` against the original that was gathered (with its Fisher). Raises SupremumError for another model."""
    original, remark = gathered.checkpoint, ""
    for name, info in original.tensors.items():
        if name not in file.tensors or tuple(file.tensors[name].shape) != tuple(info.shape):
            raise SupremumError(f"{file.source}: its tensor {name} is missing or has another shape than {original.source}'s.",
                                "Give the model that the file was made from as --reference.")
        if len(info.shape) == 1 and info.kind in DTYPES and _moved(file.read(name), original.read(name)) > MOVED:
            remark = f"{name} is another: the file was smoothed, or its norms tuned. Layers cannot be compared one by one."
    reference = final_hidden(gathered.stream, gathered.held_out)

    def quality(kept: Collection[str] = ()) -> Quality:
        """Of the file with the original's tensors `kept`."""
        own = {name for name in file.tensors if name not in kept}
        return streamed_quality(gathered.stream, gathered.held_out, reference,
                                lambda name: None if name not in own else
                                gathered.weight(name, file) if name in gathered.shapes else file.read(name),
                                "measure the file", lambda name: file.tensors[name].kind if name in own else None)

    found = quality()
    kl = max(found.kl_mean or 0.0, 1e-12)
    spectra = list(gathered.spectra())
    curve = Curve(spectra)
    weights = curve.weights
    bits = {layer.name: 8 * file.tensors[layer.name].nbytes / layer.weights for layer in spectra}
    spent, measured = sum(bits[layer.name] * layer.weights for layer in spectra) / weights, _least(curve, kl)
    whole = FileGap(file.source, original.source, spent, kl, found.kl_se or 0.0, measured, spent - measured, {}, [], remark)
    if remark:
        return whole
    nats, feedback = _damage(gathered, file, spectra)
    if not any(nats.values()):
        return _exact(whole, original, bits)
    least = {layer.name: _least(Curve([layer]), nats[layer.name]) for layer in spectra}
    wanted = dict(zip((layer.name for layer in spectra), curve.layer_bits(curve.level_at_kl(kl)),
                      strict=True))
    layers = [LayerGap(layer.name, layer.weights, bits[layer.name], nats[layer.name], least[layer.name],
                       bits[layer.name] - least[layer.name], feedback[layer.name], wanted[layer.name]) for layer in spectra]

    def mean(values: Mapping[str, float]) -> float:
        return sum(values[layer.name] * layer.weights for layer in spectra) / weights

    tables = [name for name in gathered.stream.tables()
              if not torch.equal(gathered.weight(name, file), gathered.weight(name))]
    apart = _least(curve, quality(tables).kl_mean or 0.0) if tables else measured
    own, together = mean(least), _least(curve, sum(nats.values()))
    kinds = {layer.name: file.tensors[layer.name].kind for layer in spectra}
    shaping = mean({name: (kind not in FLOATS) * SHAPING_BITS - (kind == "lattice") * GAIN / 20 * math.log2(10)
                    for name, kind in kinds.items()})
    rest = mean(bits) - own - shaping - mean(feedback)
    coded = all(kind == "lattice" for kind in kinds.values())
    remedy = "less side information, a closer entropy code" if coded else "an entropy code, fewer scales, rows' weights"
    parts = {"a water level for all layers": own - together, "error feedback": mean(feedback), remedy: rest,
             "a perfect code instead of integers or a trellis": shaping,
             "what the layers' sum misses": together - apart, "a finer embedding and head": apart - measured}
    return replace(whole, parts=parts, layers=layers)


def _exact(whole: FileGap, original: Checkpoint, names: Iterable[str]) -> FileGap:
    """Of a file that holds the layers `names` as they were."""
    stored = {name: original.tensors[name] for name in names}
    if any(info.kind not in FLOATS for info in stored.values()):
        remark = "The layers are the original's to the bit, which are coded themselves: `supremum limit ORIGINAL` tells " \
            "what an entropy code would take off."
        return replace(whole, least_bits=whole.bits, gap=0.0, remark=remark)
    weights = {name: math.prod(info.shape) for name, info in stored.items()}
    least = sum(float_bits(original.read(name))[0] * weights[name] for name in stored) / sum(weights.values())
    gap = whole.bits - least
    return replace(whole, least_bits=least, gap=gap, parts={"an entropy code that adapts to these numbers": gap},
                   remark="The layers are the original's to the bit, so what bounds them is the entropy of their numbers.")


def _moved(vector: torch.Tensor, original: torch.Tensor) -> float:
    """Length of the change over that of the original."""
    change = float((vector.float() - original.float()).norm())
    return change / max(float(original.float().norm()), 1e-6 * math.sqrt(len(original)))


def _least(curve: Curve, nats: float) -> float:
    """Bits of the limit at this damage; those of a damage of nothing would have no end."""
    return curve.bits_at_kl(max(nats, 1e-9 * curve.kl_at_zero))


def _damage(gathered: Gathered, file: Checkpoint, spectra: list[LayerSpectrum]) -> tuple[dict[str, float], dict[str, float]]:
    """Nats of each layer, and the bits that error feedback would take off."""
    numbers = {layer.name: layer.numbers for layer in spectra}
    nats, feedback = {}, {}
    for block in track(gathered.stream.blocks, "compare the layers"):
        sums, keys = moments(gathered.workspace, gathered.calls, block)
        for layer, key in keys.items():
            name = gathered.inner(block, layer)
            change_OI = gathered.weight(name, file) - gathered.weight(name)
            image_OI = change_OI @ sums[key]
            nats[name] = damage(gathered.fisher(block, layer), change_OI, image_OI)
            plain = float(change_OI.square().sum()) * float(sums[key].diagonal().mean())
            shows = plain > 0 and float((change_OI * image_OI).sum()) > FED_BACK * plain
            known = numbers[name]
            feedback[name] = 0.0 if not shows or known is None else 0.5 * math.log2(
                known.mean_diagonal / known.mean_pivot_ordered)
    return nats, feedback
