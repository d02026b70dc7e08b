"""Integers with a step for each row and each column, and what the entropy coder is told of them: the archive's codec.

    w_hat[o, i] = 2^(row_O[o] / OCTAVE) 2^(column_I[i] / OCTAVE) m[o, i]

Along a row the integers are a path of the trellis (trellis.py): what is coded is k, about half of m.

Steps are whole eighths of an octave: rounding them costs 0.002 bits a weight (ln 2 times the variance of the rounding, in
octaves), which their few bits save many times over in small matrices. An integer's class is row_class_O + column_class_I:
the deviation of m in eighths of an octave, UNIT standing for one step. The bytes on disk are in checkpoint/archive.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

OCTAVE = 8
UNIT = 34  # the class of integers with a deviation of 1; class 0: 2^-4.25, all of them zero
CLASSES = 88
GAIN = 1.27  # dB of a trellis of 64 states over all integers of its quantisers' step, at high rate (Marcellin & Fischer 1990)


@dataclass(frozen=True)
class Frame:
    """Rows' and columns' log2 steps and classes, in eighths of an octave; int16."""

    row_O: Tensor
    column_I: Tensor
    row_class_O: Tensor
    column_class_I: Tensor

    def scales(self) -> tuple[Tensor, Tensor]:
        """The rows' and the columns' factors, float32."""
        return (self.row_O.float() / OCTAVE).exp2(), (self.column_I.float() / OCTAVE).exp2()


@dataclass(frozen=True)
class Lattice:
    """One matrix of integers (O, I), int16, in its frame."""

    integers_OI: Tensor
    frame: Frame

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers_OI.shape[0], self.integers_OI.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a workspace keeps of it."""
        return {"integers_OI": self.integers_OI, **vars(self.frame)}

    def decode(self) -> Tensor:
        """w_hat (O, I), float32."""
        row_O, column_I = self.frame.scales()
        return self.integers_OI.float().mul_(row_O[:, None]).mul_(column_I)
