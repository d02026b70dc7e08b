"""Targets: the formats that stock runtimes open, and what each of them can hold.

A target answers three questions before any work is done: which codecs its runtime can run for a tensor, which tensors
must share one codec, and how many bytes a plan will take on disk, exactly. Then it writes the files and says how to run
them. A new target is one file and its entry in `_factories`. Importing this module loads no library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SupremumError

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs import Coded


class Target(Protocol):
    """A format that a stock runtime opens. Stateless; instances are shared."""

    name: str  # "gguf", "compressed-tensors"
    runtime: str  # the engine in supremum.runtime that proves the result: "llama_cpp", "transformers"
    menu: tuple[str, ...]  # codecs that allocation chooses from: of all it can hold, those worth their solving time
    least: tuple[str, ...]  # smaller ones, dearer to solve, for a size or bits that cannot be had without
    allocates: bool  # whether `optimize` chooses among its codecs, whose bytes `size` knows beforehand; an archive: fill.py

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        """Names of the codecs that the runtime can run for this tensor; empty if it must stay as it is.

        Raises CheckpointError if the target cannot hold this architecture at all.
        """

    def ties(self, checkpoint: Any) -> list[list[str]]:
        """Groups of tensor names that must share one codec, because runtimes fuse them."""

    def together(self, names: Collection[str]) -> None:
        """Raises CheckpointError if the runtime cannot read these codecs in one file."""

    def size(self, checkpoint: Any, plan: Mapping[str, str]) -> int:
        """Exact bytes of all files that `write` would make under this plan (tensor name -> codec name)."""

    def how_to_run(self, architecture: str, codecs: Collection[str], file: str) -> str:
        """Markdown: the commands that run a result. `architecture`: its Transformers class; `codecs`: those of its plan;
        `file`: what the runtime opens, relative to the folder, safe within a code block."""

    def write(self, checkpoint: Any, coded: Mapping[str, Coded], folder: Path) -> Path:
        """Write the files into `folder`; tensors that are not in `coded` stay as they are.

        `coded` may be lazy (`LazyCoded`): each key is read once, in the order of `checkpoint.tensors`. Returns the
        path that the runtime opens.
        """


class LazyCoded(Mapping[str, "Coded"]):
    """Compressed tensors that are loaded when they are written. `plan`: tensor name -> codec name."""

    def __init__(self, plan: Mapping[str, str], load: Callable[[str], Coded]) -> None:
        self.plan = dict(plan)
        self._load = load

    def __getitem__(self, name: str) -> Coded:
        if name not in self.plan:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)

    def __contains__(self, name: object) -> bool:
        return name in self.plan

    def decoded(self, name: str) -> Tensor | None:
        """The weight (O, I) as its readers will see it; None where the tensor stays as it is."""
        return self[name].decode() if name in self.plan else None


def plan_of(coded: Mapping[str, Coded]) -> dict[str, str]:
    """Tensor name -> codec name, without loading anything from a `LazyCoded`."""
    return coded.plan if isinstance(coded, LazyCoded) else {name: coded[name].codec.name for name in coded}


def _gguf() -> Target:
    from .write_gguf import GGUFTarget

    return GGUFTarget()


def _compressed_tensors() -> Target:
    from .write_compressed_tensors import CompressedTensorsTarget

    return CompressedTensorsTarget()


def _gptq() -> Target:
    from .write_gptq import GPTQTarget

    return GPTQTarget()


def _archive() -> Target:
    from .write_archive import ArchiveTarget

    return ArchiveTarget()  # type: ignore[return-value]


def _int8() -> Target:
    from .int8 import Int8Target

    return Int8Target()  # type: ignore[return-value]


_factories: dict[str, Callable[[], Target]] = {
    "gguf": _gguf, "compressed-tensors": _compressed_tensors, "gptq": _gptq, "archive": _archive, "int8": _int8}


ONE_VERB = {"gptq": "optimize", "int8": "convert"}  # without compressed layers no GPTQ folder; for int8 there is no choice


def names(verb: str = "") -> list[str]:
    """All targets that can be written, or those of `verb` ("optimize", "convert"), sorted."""
    return sorted(name for name in _factories if not verb or ONE_VERB.get(name, verb) == verb)


def target_for(verb: str, name: str) -> Target:
    """The target called `name`. Raises SupremumError if `verb` has no such target."""
    found = target(name)
    if name not in names(verb):
        raise SupremumError(f"--target {name} is for `supremum {ONE_VERB[name]}` alone.",
                            f"For {verb} choose one of: {', '.join(names(verb))}.")
    return found


@cache
def target(name: str) -> Target:
    """The target called `name`. Raises SupremumError with the names that exist."""
    if name not in _factories:
        raise SupremumError(f"There is no target {name!r}.", f"Choose one of: {', '.join(names())}.")
    return _factories[name]()
