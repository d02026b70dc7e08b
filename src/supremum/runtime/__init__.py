"""Runtimes: the engines that people run models in, behind one protocol.

A runtime opens a finished folder or file and nothing else. Supremum measures with it and proves with it (`verify`),
always in a process of its own. A new engine is one file and its entry in `_engines`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import SupremumError


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted mean KL (nats) and mean relative error of the log-probabilities."""

    kl: float
    error: float


@dataclass(frozen=True)
class Capabilities:
    """What `verify` and the reports know of an engine without loading a model."""

    title: str  # for people: "llama.cpp"
    rounds: bool  # whether it rounds activations, as `rounding` describes
    compressed: bool  # whether weights stay compressed in its memory
    floor: Tolerance  # what its arithmetic alone may differ from our decoding
    budgets: bool = False  # whether --memory and --speed are measured in it (costs.py)
    package: str = ""  # without which results are written all the same, and called not proved


@dataclass(frozen=True)
class Speed:
    """Tokens per second, batch of one."""

    prefill: float
    decode: float


class Runtime(Protocol):
    """A loaded model."""

    name: str
    version: str
    capabilities: Capabilities

    def __init__(self, path: Path, threads: int, context: int) -> None:
        """Load the model. Raises SupremumError if the engine is not installed or refuses the file."""

    def tokenize(self, text: str) -> list[int]:
        """The engine's own token ids of `text`, special tokens as a plain prompt gets them."""

    def logprobs(self, tokens: list[int], lengths: list[int], count: int) -> list[tuple[list[int], list[float]]]:
        """For each prefix of `tokens` with one of these lengths (ascending): ids and natural log-probabilities of the
        `count` likeliest next tokens, from a softmax over the whole vocabulary."""

    def speed(self, tokens: list[int], new: int) -> Speed:
        """Prefill of `tokens`, then `new` tokens one by one."""

    def close(self) -> None:
        """Free the model."""


def _llama_cpp() -> type[Runtime]:
    from .llama_cpp import LlamaCpp

    return LlamaCpp


def _transformers() -> type[Runtime]:
    from .transformers import Transformers

    return Transformers


def _gptqmodel() -> type[Runtime]:
    from .gptqmodel import GPTQModel

    return GPTQModel


_engines: dict[str, Callable[[], type[Runtime]]] = {
    "llama_cpp": _llama_cpp, "transformers": _transformers, "gptqmodel": _gptqmodel}


def names() -> list[str]:
    """All engines, sorted."""
    return sorted(_engines)


def load(name: str, path: str | Path, *, threads: int = 1, context: int = 1024, **options: Any) -> Runtime:
    """Open `path` in the engine `name`, in this process. `context`: tokens that must fit; options: the engine's own.

    Raises SupremumError if the engine is unknown, is not installed, or refuses the file.
    """
    return _engine(name)(Path(path), threads, context, **options)


def capabilities(name: str) -> Capabilities:
    """Those of the engine `name`. Raises SupremumError if it is unknown."""
    return _engine(name).capabilities


def _engine(name: str) -> type[Runtime]:
    if name not in _engines:
        raise SupremumError(f"There is no runtime {name!r}.", f"Choose one of: {', '.join(names())}.")
    return _engines[name]()
