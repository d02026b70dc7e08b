"""Water-filling on integers: successive cancellation with a step for each row and column, for entropy-coded weights.

The damage tr(B dW S dW^T) / 2, S = E[x x^T] and B = E[g g^T] the output Fisher, is that of a lattice code in two
directions. With S^-1 = U^T U and B^-1 = V^T V (U, V upper triangular) an error r_o of row o is cancelled in the rows behind
it, and within a row the error of column i in the columns behind that:

    W_p <- W_p - V_op / V_oo r_o   for p > o            e_i = (w_i - w_hat_i) / U_ii,  w_k <- w_k - e_i U_ik   for k > i

(the second is solve/cancellation.py, arXiv 2210.17323; both together arXiv 2505.22988). Each weight then adds the same,
theta / 2 nats, if its step is (WaterSIC, arXiv 2603.04956, with rows as well)

    step[o, i] = sqrt(12 theta) V_oo U_ii

theta is the water level of the limit (limits/information.py), one for the whole model: bits go where they buy most. An
integer costs bits as well as error, so it is the one of the two neighbours of the wish u (in steps) with the least

    (u - z)^2 + RATE bits(z),   RATE = 2 ln 2 / 12

which is where, at high rate, a further bit saves as much distortion as it saves elsewhere (dD/dR = -2 ln 2 D, D = 1/12).
bits(z) is that of a rounded normal, in classes of its deviation: sigma = 2^((k - UNIT) / OCTAVE) steps, k the sum of a
row's and a column's class. The coder uses the same classes, with what it really counts in each.

The loops over a row are Numba's; what a block of rows leaves to the rest is one matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from ..codecs.lattice import CLASSES, OCTAVE, UNIT, Frame, Lattice
from .cancellation import Metric

BLOCK = 32  # rows whose errors are handed on together
RATE = 2 * math.log(2) / 12
REACH = 120  # eighths of an octave that a frame's vector may leave its median by
MAGNITUDES = 128  # integers whose cost is known; larger ones are taken to the nearest
ESCAPED = 44.0  # bits of such a one: the escape and the integer in full


@dataclass(frozen=True)
class Outputs:
    """The output Fisher made ready: rows in order, V_oo of each, and V_op / V_oo (O, O) unless B is diagonal."""

    order_O: Tensor
    pivot_O: Tensor
    shares_OO: Tensor | None

    @classmethod
    def of(cls, fisher: Tensor, damping: float) -> Outputs:
        """`fisher`: B (O, O), or its diagonal (O,)."""
        if fisher.ndim == 1:
            floor = fisher.double().mean().clamp_min(1e-300) * damping
            return cls(torch.arange(len(fisher)), (fisher.double() + floor).rsqrt(), None)
        metric = Metric.of(fisher, damping=damping)
        pivot_O = metric.factor_II.diagonal()
        return cls(metric.order_I, pivot_O.double(), metric.factor_II / pivot_O[:, None])


@dataclass(frozen=True)
class Spread:
    """log2 of the deviations of a matrix's wishes, of each row and column, in eighths of an octave: w ~ N(0, 4^(r + c))."""

    row_O: Tensor
    column_I: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor) -> Spread:
        """Of the weights themselves: the wishes differ from them by what other errors have left."""
        square_OI = weight_OI.double().square()
        row_O = square_OI.mean(1).clamp_min(1e-60)
        column_I = (square_OI / row_O[:, None]).mean(0).clamp_min(1e-30)
        return cls(row_O.log2() * (OCTAVE / 2), column_I.log2() * (OCTAVE / 2))


@dataclass(frozen=True)
class Watered:
    """One matrix of integers, and what it costs."""

    lattice: Lattice
    bits: float  # by the rounded normal's cost; what is written differs by its shape
    nats: float  # tr(B dW S dW^T) / 2 of the damped metrics

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a workspace keeps of it."""
        return {"nats": torch.tensor([self.nats], dtype=torch.float64), **self.lattice.tensors}

    def decode(self) -> Tensor:
        return self.lattice.decode()


def water(target_OI: Tensor, metric: Metric, outputs: Outputs, level: float, spread: Spread) -> Watered:
    """Solve one matrix. level: theta, nats. Matrices of the same inputs and columns of `spread` share those of the frame."""
    pivot_I = torch.empty(len(metric.order_I), dtype=torch.float64)
    pivot_I[metric.order_I] = metric.factor_II.diagonal().double()
    pivot_O = torch.empty(len(outputs.order_O), dtype=torch.float64)
    pivot_O[outputs.order_O] = outputs.pivot_O
    row_O = _held(OCTAVE * (0.5 * math.log2(12 * level) + pivot_O.log2()))
    column_I = _held(OCTAVE * pivot_I.log2())
    frame = Frame(row_O.short(), column_I.short(), _held(spread.row_O - row_O).short(),
                  _held(spread.column_I - column_I).short() + UNIT)
    rows, columns = outputs.order_O.numpy(), metric.order_I.numpy()
    step_O = (row_O / OCTAVE).exp2().float().numpy()[rows]
    step_I = (column_I / OCTAVE).exp2().float().numpy()[columns]
    row_class_O, column_class_I = frame.row_class_O.numpy()[rows], frame.column_class_I.numpy()[columns]
    work_OI = target_OI[outputs.order_O][:, metric.order_I].contiguous()
    lower_II = np.ascontiguousarray(metric.factor_II.numpy().T)
    weight_O = (1 / outputs.pivot_O.square()).numpy()
    integers_OI = np.empty(work_OI.shape, np.int16)
    bits = loss = 0.0
    for begin in range(0, len(work_OI), BLOCK):
        part = slice(begin, min(begin + BLOCK, len(work_OI)))
        shares_BB = np.zeros((0, 0), np.float32) if outputs.shares_OO is None else outputs.shares_OO[part, part].numpy()
        error_BI = np.empty((part.stop - begin, len(columns)), np.float32)
        more_bits, more_loss = _round(work_OI.numpy()[part], shares_BB, lower_II, step_O[part], step_I, row_class_O[part],
                                      column_class_I, normal_bits(), weight_O[part], integers_OI[part], error_BI)
        bits, loss = bits + more_bits, loss + more_loss
        if outputs.shares_OO is not None and part.stop < len(work_OI):
            work_OI[part.stop:].addmm_(outputs.shares_OO[part, part.stop:].T, torch.from_numpy(error_BI), alpha=-1)
    natural_OI = torch.empty(work_OI.shape, dtype=torch.int16)
    natural_OI[outputs.order_O[:, None], metric.order_I] = torch.from_numpy(integers_OI)
    return Watered(Lattice(natural_OI, frame), bits, loss / 2)


def _held(eighths: Tensor) -> Tensor:
    """Whole numbers, within REACH of the median: an archive stores them in a byte. 15 octaves either way are enough."""
    middle = eighths.median().round()
    return eighths.round().clamp(middle - REACH, middle + REACH)


@cache
def normal_bits() -> NDArray[np.float32]:
    """(CLASSES, MAGNITUDES) bits of an integer of that magnitude, its sign included, under the class's rounded normal."""
    sigma_K1 = 2.0 ** ((np.arange(CLASSES) - UNIT) / OCTAVE)[:, None]
    magnitude = np.arange(MAGNITUDES)
    mass = norm.sf((magnitude - 0.5) / sigma_K1) - norm.sf((magnitude + 0.5) / sigma_K1)
    return np.asarray(-np.log2(np.maximum(mass, 2.0**-24)), np.float32)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _round(work_BI, shares_BB, lower_II, step_B, step_I, class_B, class_I, bits_KM, weight_B, integers_BI,
           error_BI):
    """Round a block of rows; lower_II[i, t] = U[t, i]. Fills integers and r_o; (bits, sum of weight_B e^2)."""
    rows, columns = work_BI.shape
    last, largest = bits_KM.shape[0] - 1, bits_KM.shape[1] - 2
    bits = loss = 0.0
    wish_I, scaled_I = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for o in range(rows):
        wish_I[:] = work_BI[o]
        if len(shares_BB):
            for p in range(o):
                share = shares_BB[p, o]
                for i in range(columns):
                    wish_I[i] -= share * error_BI[p, i]
        square = 0.0
        for i in range(columns):
            lower_I = lower_II[i]
            passed = np.float32(0)
            for t in range(i):
                passed += scaled_I[t] * lower_I[t]
            wish = wish_I[i] - passed
            step = step_B[o] * step_I[i]
            size = min(abs(wish) / step, np.float32(32767))
            below = int(size)
            rest = size - np.float32(below)
            if below > largest:
                up = rest > 0.5
                bits += ESCAPED
            else:
                k = min(max(class_B[o] + class_I[i], 0), last)
                low, high = bits_KM[k, below], bits_KM[k, below + 1]
                up = (1 - rest) ** 2 + np.float32(RATE) * high < rest ** 2 + np.float32(RATE) * low
                bits += high if up else low
            z = min(below + up, 32767)
            z = -z if wish < 0 else z
            integers_BI[o, i] = z
            value = np.float32(z) * step
            error_BI[o, i] = wish_I[i] - value
            scaled_I[i] = (wish - value) / lower_I[i]
            square += scaled_I[i] * scaled_I[i]
        loss += weight_B[o] * square
    return bits, loss


def flat(weight_OI: Tensor, bits: float = 4.0) -> Lattice:
    """About so many bits a weight under no metric but the squared error: needs no text."""
    size = weight_OI.shape[1]
    metric = Metric(torch.eye(size), torch.arange(size), torch.eye(size))
    level = float(weight_OI.square().mean().clamp_min(1e-30)) * 4.0 ** (0.25 - bits)
    rows = Outputs(torch.arange(len(weight_OI)), torch.ones(len(weight_OI), dtype=torch.float64), None)
    return water(weight_OI, metric, rows, level, Spread.of(weight_OI)).lattice
