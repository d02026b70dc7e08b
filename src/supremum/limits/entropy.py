"""How few bits the stored weights take without changing one of them, and how far from Gaussian they are.

A float is split into sign, exponent and mantissa bytes. Each part is coded by an ideal adaptive arithmetic coder, whose
length is known in closed form: with Dirichlet(1/2) counts n_k of K symbols in a context (Krichevsky & Trofimov 1981)

    bits = log2 Gamma(n + K/2) - log2 Gamma(K/2) - sum_k (log2 Gamma(n_k + 1/2) - log2 Gamma(1/2))

so learning the tables is paid for: the length is one that a decoder could live on, not an entropy read from its own
sample. The exponent's context is the best of: none, the weight to the left, the row's scale, the column's scale (8 bits
each). Mantissa bytes are coded given the exponent. Blocks of a quantised file are coded byte by byte, the place in the
block as the context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.gguf_header import read_header

CHUNK = 2**22  # weights looked at together
FIELDS = {  # exponent bits, mantissa bits
    torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10),
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32")  # kinds of tensors that `float_bits` takes
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class TensorEntropy:
    """One stored tensor; bits are per weight."""

    name: str
    kind: str
    weights: int
    stored_bits: float
    lossless_bits: float
    context: str  # of the exponent: "none", "left", "row", "column"; "block" for quantised bytes


@dataclass(frozen=True)
class Lossless:
    """All tensors; bits per weight, means over all weights."""

    weights: int
    stored_bits: float
    lossless_bits: float
    tensors: tuple[TensorEntropy, ...]
    skipped: tuple[str, ...]  # kinds whose stored bits could not be looked into; counted as stored


def adaptive_bits(counts: Tensor) -> float:
    """Length in bits of the adaptive code of symbols with these counts; (..., K), contexts in front."""
    n = counts.double().reshape(-1, counts.shape[-1])
    n = n[n.sum(1) > 0]
    half = n.shape[1] / 2
    length = torch.lgamma(n.sum(1) + half) - math.lgamma(half) - (torch.lgamma(n + 0.5) - math.lgamma(0.5)).sum(1)
    return float(length.sum()) / math.log(2)


def _count(total: Tensor, context: Tensor, symbol: Tensor) -> None:
    """Add one to total[context, symbol] for every element."""
    flat = (context.long() * total.shape[1] + symbol.long()).flatten()
    total += torch.bincount(flat, minlength=total.numel()).view_as(total)


def _scale_class(square_mean: Tensor) -> Tensor:
    """Half octaves of a root mean square, as 64 classes."""
    return (square_mean.clamp(min=2.0**-120).log2().round() + 56).clamp(0, 63).long()


def float_bits(tensor: Tensor) -> tuple[float, str]:
    """(lossless bits per weight, best context) of a float32, bfloat16 or float16 tensor of any shape."""
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)
    exponent_bits, mantissa_bits = FIELDS[tensor.dtype]
    pieces = [(shift, min(8, mantissa_bits - shift)) for shift in range(0, mantissa_bits, 8)]
    symbols = 2**exponent_bits
    rows, columns = matrix.shape
    energy_row = torch.cat([part.float().square().mean(1) for part in matrix.split(max(1, CHUNK // columns))])
    energy_column = sum(part.float().square().sum(0) for part in matrix.split(max(1, CHUNK // columns))) / rows
    row_class, column_class = _scale_class(energy_row), _scale_class(torch.as_tensor(energy_column))
    contexts = {"none": torch.zeros(1, symbols), "left": torch.zeros(symbols, symbols)}
    if min(rows, columns) > 1:
        contexts |= {"row": torch.zeros(64, symbols), "column": torch.zeros(64, symbols)}
    contexts = {name: table.long() for name, table in contexts.items()}
    sign = torch.zeros(1, 2, dtype=torch.long)
    mantissa = [torch.zeros(symbols, 2**width, dtype=torch.long) for _, width in pieces]
    start = 0
    for part in matrix.split(max(1, CHUNK // columns)):
        bits = part.contiguous().view(INTEGER[part.dtype]).int()
        exponent = (bits >> mantissa_bits) & (symbols - 1)
        left = torch.cat([torch.zeros_like(exponent[:, :1]), exponent[:, :-1]], 1)
        _count(sign, torch.zeros_like(bits), (bits < 0).int())
        for name, table in contexts.items():
            if name == "row":
                given = row_class[start : start + len(part), None].expand_as(bits)
            elif name == "column":
                given = column_class[None].expand_as(bits)
            else:
                given = left if name == "left" else torch.zeros_like(bits)
            _count(table, given, exponent)
        for (shift, width), table in zip(pieces, mantissa, strict=True):
            _count(table, exponent, (bits >> shift) & (2**width - 1))
        start += len(part)
    side = {"none": 0, "left": 0, "row": 8 * rows, "column": 8 * columns}
    lengths = {name: adaptive_bits(table) + side[name] for name, table in contexts.items()}
    best = min(lengths, key=lambda name: lengths[name])
    total = lengths[best] + adaptive_bits(sign)
    for (_, width), table in zip(pieces, mantissa, strict=True):
        total += min(adaptive_bits(table), adaptive_bits(table.sum(0, keepdim=True)), float(width * tensor.numel()))
    return total / tensor.numel(), best


def block_bits(blocks: Tensor) -> float:
    """Lossless bits of quantised blocks, (n, bytes a block) uint8, all together."""
    width = blocks.shape[1]
    counts = torch.zeros(width, 256, dtype=torch.long)
    place = torch.arange(width)
    for part in blocks.split(max(1, CHUNK // width)):
        _count(counts, place.expand_as(part), part)
    return sum(min(adaptive_bits(row), 8.0 * len(blocks)) for row in counts)


def _of_gguf(path: Any) -> Iterator[TensorEntropy]:
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for entry in read_header(path).tensors.values():
        kind, weights = entry.type.name, math.prod(entry.shape)
        data = torch.from_numpy(np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset))
        stored = 8 * data.numel() / weights
        if kind in floats:
            bits, context = float_bits(data.view(floats[kind]).view(-1, entry.shape[-1]))
        else:
            bits, context = block_bits(data.view(-1, entry.type.nbytes)) / weights, "block"
        yield TensorEntropy(entry.name, kind, weights, stored, bits, context)


def _of_floats(checkpoint: Any) -> Iterator[TensorEntropy]:
    for name, info in checkpoint.tensors.items():
        weights = math.prod(info.shape)
        stored = 8 * info.nbytes / weights
        if info.kind in FLOATS:
            bits, context = float_bits(checkpoint.read(name))
        else:
            bits, context = stored, ""
        yield TensorEntropy(name, info.kind, weights, stored, bits, context)


def summarise(tensors: Iterable[TensorEntropy]) -> Lossless:
    """Totals over tensors."""
    kept = tuple(tensors)
    weights = sum(t.weights for t in kept)
    return Lossless(
        weights,
        sum(t.weights * t.stored_bits for t in kept) / weights,
        sum(t.weights * t.lossless_bits for t in kept) / weights,
        kept,
        tuple(sorted({t.kind for t in kept if not t.context})),
    )


def lossless(checkpoint: Any) -> Lossless:
    """The lossless size of an opened Checkpoint's stored tensors, one in memory at a time."""
    return summarise(_of_gguf(checkpoint.path) if checkpoint.format == "gguf" else _of_floats(checkpoint))


def negentropy_bits(weight_OI: Tensor, *, sample: int = 2**17) -> tuple[float, float]:
    """(negentropy, spread) in bits per weight: how much lower than the Gaussian bound the true one lies at high rate.

    Negentropy: of the weights divided by their row's and column's root mean square, from a histogram of 0.05 standard
    deviations with the Miller-Madow correction. Spread: log of the arithmetic over the geometric mean of those row and
    column variances, halved; what a code with a scale a row and a column gains over one scale for the matrix. Rows far
    apart stand for all: `sample` weights, but 256 rows at least.
    """
    stride = max(1, min(weight_OI.numel() // sample, weight_OI.shape[0] // 256))
    w = weight_OI[::stride].detach().cpu().double()
    tiny = torch.finfo(torch.float32).tiny
    row = w.square().mean(1).clamp(min=tiny)
    column = (w.square() / row[:, None]).mean(0).clamp(min=tiny)
    z = w / (row[:, None] * column[None]).sqrt()
    variance = row[:, None] * column[None]
    spread = 0.5 * float(variance.mean().log2() - variance.log2().mean())
    counts = torch.histc(z, bins=400, min=-10, max=10)
    counts = counts[counts > 0]
    p = counts / counts.sum()
    entropy = float(-(p * p.log2()).sum()) + (len(p) - 1) / (2 * z.numel() * math.log(2)) + math.log2(0.05)
    return 0.5 * math.log2(2 * math.pi * math.e * float(z.var())) - entropy, spread
