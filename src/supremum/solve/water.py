"""Water-filling on a trellis: successive cancellation with a step for each row and column, for entropy-coded weights.

The damage tr(B dW S dW^T) / 2, S = E[x x^T] and B = E[g g^T] the output Fisher, is that of a code in two directions. With
S^-1 = U^T U and B^-1 = V^T V (U, V upper triangular) an error r_o of row o is cancelled in the rows behind it, and within a
row the error of column i in the columns behind that:

    W_p <- W_p - V_op / V_oo r_o   for p > o            e_i = (w_i - w_hat_i) / U_ii,  w_k <- w_k - e_i U_ik   for k > i

(the second is solve/cancellation.py, arXiv 2210.17323; both together arXiv 2505.22988). Each weight then adds the same,
theta / 2 nats, if its step is (WaterSIC, arXiv 2603.04956, with rows as well)

    step[o, i] = sqrt(theta / DISTORTION) V_oo U_ii

theta is the water level of the limit (limits/information.py), one for the whole model: bits go where they buy most. A row's
integers are a path of the trellis (codecs/trellis.py). A number costs bits as well as error, so with u the wish in steps the
path is sought that has the least sum over columns of

    (u - m)^2 + RATE bits(m),   RATE = 2 ln 2 DISTORTION

which is where, at high rate, a further bit saves as much distortion as it saves elsewhere (dD/dR = -2 ln 2 D). The search is
solve/viterbi.py's; the coder uses the same classes of deviations, with what it really counts in each. Columns go in their own
order, which the decoder knows; rows with the smallest B first: what lies under water there still finds others behind it that
absorb its error. What a block of rows leaves to the rest is one matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..codecs.lattice import OCTAVE, UNIT, Frame, Lattice
from ..codecs.trellis import DISTORTION
from .cancellation import Metric, damped, inverse_factor
from .viterbi import search

BLOCK = 32  # rows whose errors are handed on together
RATE = 2 * math.log(2) * DISTORTION
RARE = 0.01  # of the mean, added to the Fisher of rows that are taken apart: some came hardly ever in the text
REACH = 120  # eighths of an octave that a frame's vector may leave its median by
MOST_STEPS = 1 << 14  # that the largest weight of a column may take: a huge S_ii asks for more than int16 holds


def trusted(fisher_OO: Tensor, damping: float) -> Tensor:
    """B, float32, what lies beside its diagonal divided by 1 + damping: a row's own weight, and so its step, stays."""
    return damped(fisher_OO.float(), damping) / (1 + damping)


@dataclass(frozen=True)
class Outputs:
    """The output Fisher made ready: rows in order, V_oo of each, and V_op / V_oo (O, O) unless B is diagonal."""

    order_O: Tensor
    pivot_O: Tensor
    shares_OO: Tensor | None

    @classmethod
    def of(cls, fisher: Tensor, damping: float) -> Outputs:
        """`fisher`: B (O, O), which is `trusted` so far; or its diagonal (O,)."""
        if fisher.ndim == 1:
            mean = float(fisher.double().mean())
            floor = RARE * mean if mean > 0 else 1.0  # of outputs that never mattered all alike
            return cls(torch.arange(len(fisher)), (fisher.double() + floor).rsqrt(), None)
        fisher_OO = trusted(fisher, damping)
        order_O = torch.argsort(fisher_OO.diagonal(), stable=True)
        factor_OO = inverse_factor(fisher_OO[order_O][:, order_O])
        pivot_O = factor_OO.diagonal()
        return cls(order_O, pivot_O.double(), factor_OO / pivot_O[:, None])


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
    bits: float  # by the normal's cost; what is written differs by its shape
    nats: float  # tr(B dW S dW^T) / 2 of the damped metrics

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a workspace keeps of it."""
        return {"nats": torch.tensor([self.nats], dtype=torch.float64), **self.lattice.tensors}

    def decode(self) -> Tensor:
        return self.lattice.decode()


def water(target_OI: Tensor, metric: Metric, outputs: Outputs, level: float, spread: Spread) -> Watered:
    """Solve one matrix. level: theta, nats. Matrices of the same inputs and columns of `spread` share those of the
    frame, but where MOST_STEPS raised one.

    metric: with the columns in their own order (`act_order=False`)."""
    pivot_I = metric.factor_II.diagonal().double()
    pivot_O = torch.empty(len(outputs.order_O), dtype=torch.float64)
    pivot_O[outputs.order_O] = outputs.pivot_O
    row_O = _held(OCTAVE * (0.5 * math.log2(level / DISTORTION) + pivot_O.log2()))
    column_I = _held(OCTAVE * pivot_I.log2())
    largest_I = (target_OI.abs() / (row_O / OCTAVE).exp2().float()[:, None]).amax(0).double().clamp_min(1e-30)
    column_I = _held(torch.maximum(column_I, (OCTAVE * (largest_I / MOST_STEPS).log2()).ceil()))
    frame = Frame(row_O.short(), column_I.short(), _held(spread.row_O - row_O).short(),
                  _held(spread.column_I - column_I).short() + UNIT)
    rows = outputs.order_O.numpy()
    step_O = (row_O / OCTAVE).exp2().float().numpy()[rows]
    step_I = (column_I / OCTAVE).exp2().float().numpy()
    row_class_O, column_class_I = frame.row_class_O.numpy()[rows], frame.column_class_I.numpy()
    work_OI = target_OI[outputs.order_O].contiguous()
    upper_II = metric.factor_II.numpy()
    lower_II = np.ascontiguousarray(upper_II.T)
    weight_O1 = outputs.pivot_O.float().square().reciprocal()[:, None]
    integers_OI = np.empty(work_OI.shape, np.int16)
    bits = loss = 0.0
    for begin in range(0, len(work_OI), BLOCK):
        part = slice(begin, min(begin + BLOCK, len(work_OI)))
        shares_BB = np.zeros((0, 0), np.float32) if outputs.shares_OO is None else outputs.shares_OO[part, part].numpy()
        error = np.empty((part.stop - begin, len(column_I)), np.float32)
        bits += search(work_OI.numpy()[part], shares_BB, upper_II, lower_II, step_O[part], step_I, row_class_O[part],
                       column_class_I, RATE, integers_OI[part], error)
        error_BI = torch.from_numpy(error)
        loss += float(((error_BI @ metric.moment_II) * error_BI * weight_O1[part]).sum(dtype=torch.float64))
        if outputs.shares_OO is not None and part.stop < len(work_OI):
            work_OI[part.stop:].addmm_(outputs.shares_OO[part, part.stop:].T, error_BI, alpha=-1)
    natural_OI = torch.empty(work_OI.shape, dtype=torch.int16)
    natural_OI[outputs.order_O] = torch.from_numpy(integers_OI)
    return Watered(Lattice(natural_OI, frame), bits, loss / 2)


def _held(eighths: Tensor) -> Tensor:
    """Whole numbers, within REACH of the median: an archive stores them in a byte. 15 octaves either way are enough."""
    middle = eighths.median().round()
    return eighths.round().clamp(middle - REACH, middle + REACH)


def flat(weight_OI: Tensor, bits: float = 4.0) -> Lattice:
    """About so many bits a weight under no metric but the squared error: needs no text."""
    size = weight_OI.shape[1]
    metric = Metric(torch.eye(size), torch.arange(size), torch.eye(size))
    level = float(weight_OI.square().mean().clamp_min(1e-30)) * 4.0 ** (0.1 - bits)
    rows = Outputs(torch.arange(len(weight_OI)), torch.ones(len(weight_OI), dtype=torch.float64), None)
    return water(weight_OI, metric, rows, level, Spread.of(weight_OI)).lattice
