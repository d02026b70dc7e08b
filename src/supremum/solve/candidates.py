"""Candidates: every layer solved in every codec that it may take, so that options are priced by what they really do.

One file a block holds them as they would be written; `Candidates` reads them back lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from .. import codecs
from ..checkpoint.targets import LazyCoded
from ..codecs import Coded
from ..progress import track
from ..workspace import Workspace
from .cancellation import Metric, nearest, side_by_side, solve_together

Oriented = Callable[[str], Tensor]  # tensor name -> weight (O, I), float32


class Matrix(Protocol):
    """A solved matrix: `Coded`, or what an archive holds."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def decode(self) -> Tensor: ...


def save_matrices(workspace: Workspace, file: str, matrices: Mapping[str, Matrix]) -> None:
    """Write solved matrices under "name|field" keys."""
    workspace.save(file, {f"{name}|{field}": tensor for name, m in matrices.items() for field, tensor in m.tensors.items()})


def read_matrix(workspace: Workspace, file: str, name: str) -> dict[str, Tensor]:
    """One matrix's tensors by field."""
    found = workspace.load(file, [key for key in workspace.keys(file) if key.rpartition("|")[0] == name])
    return {key.rpartition("|")[2]: tensor for key, tensor in found.items()}


def load_coded(workspace: Workspace, file: str, key: str, codec: str, shape_OI: tuple[int, int]) -> Coded:
    """Read back a matrix of a codec; `key` as it was saved under."""
    return Coded(codecs.get(codec), read_matrix(workspace, file, key), shape_OI)


class Candidates:
    """All solved candidates of a run, by tensor name and codec name."""

    def __init__(self, workspace: Workspace, weight: Oriented, menu: Mapping[str, list[str]],
                 shapes: Mapping[str, tuple[int, int]]) -> None:
        """menu: tensor name -> codec names. weight and shapes: in (O, I) orientation."""
        self.workspace, self.weight, self.menu, self.shapes = workspace, weight, menu, shapes
        self._file: dict[str, str] = {}

    def solve_block(self, file: str, moments: Mapping[str, Tensor], groups: Mapping[str, list[str]]) -> None:
        """Solve one block: moments by key, groups: key -> tensor names that read that input."""
        for names in groups.values():
            self._file.update(dict.fromkeys(names, file))
        if self.workspace.has(file):
            return
        tasks = []
        for key, names in groups.items():
            wanted = sorted({codec for name in names for codec in self.menu.get(name, [])})
            if not wanted:
                continue
            metric = Metric.of(moments[key])
            weights = {name: self.weight(name) for name in names}
            tasks += [({name: weights[name] for name in names if codec in self.menu.get(name, [])}, metric, codec)
                      for codec in wanted]
        results = side_by_side(lambda task: solve_together(task[0], task[1], codecs.get(task[2]), refits=0), tasks)
        solved = {f"{name}|{codec}": coded for (_, _, codec), result in zip(tasks, results, strict=True)
                  for name, coded in result.items()}
        save_matrices(self.workspace, file, solved)

    def solve_table(self, file: str, name: str, metric: Metric | None) -> None:
        """Solve the embedding or the head; without a metric (an embedding that is no head) by nearest rounding."""
        self._file[name] = file
        if self.workspace.has(file) or not self.menu.get(name):
            return
        weight_OI = self.weight(name)
        solved = {}
        for codec in track(self.menu[name], "solve the embedding"):
            kind = codecs.get(codec)
            solved[f"{name}|{codec}"] = nearest(weight_OI, kind) if metric is None else \
                solve_together({name: weight_OI}, metric, kind, refits=0)[name]
        save_matrices(self.workspace, file, solved)

    def get(self, name: str, codec: str) -> Coded:
        return load_coded(self.workspace, self._file[name], f"{name}|{codec}", codec, self.shapes[name])

    def coded(self, plan: Mapping[str, str]) -> LazyCoded:
        """The plan (tensor name -> codec name) made of the candidates."""
        return LazyCoded(plan, lambda name: self.get(name, plan[name]))
