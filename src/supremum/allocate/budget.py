"""What the user is willing to spend."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Limits on the result; those given hold together.

    size: bytes of everything the runtime needs. bits: bits a weight of the blocks' linear layers, scales included.
    max_kl: nats a token from the original on held-out text; alone it asks for the smallest such file.
    memory: resident bytes of the target's runtime while it decodes. speed: of decoding, at least; "2x" the original's in that
    runtime, or "150" tokens/s. Both are measured on this machine.
    """

    size: int | None = None
    bits: float | None = None
    max_kl: float | None = None
    memory: int | None = None
    speed: str | None = None

    def __post_init__(self) -> None:
        limits = asdict(self)
        if all(value is None for value in limits.values()):
            raise BudgetError("no budget was given.", "Give a size, bits a weight, a largest KL, memory or speed.")
        if self.speed is not None:
            try:
                limits["speed"] = float(self.speed.removesuffix("x"))
            except ValueError as error:
                raise BudgetError(f"speed {self.speed!r} is no speed.", "Write it like 2x or 150 (tokens/s).") from error
        for name, value in limits.items():
            if value is not None and not 0 < value < math.inf:
                raise BudgetError(f"{name} {value} is not a positive number.", "Give a finite number above zero.")

    @property
    def name(self) -> str:
        """For a folder: "size-75000000-max_kl-0.05"."""
        return "-".join(f"{name}-{value}" for name, value in asdict(self).items() if value is not None)

    def step_seconds(self, original: float) -> float | None:
        """The longest decode step that keeps `speed`; original: seconds of the original's."""
        if self.speed is None:
            return None
        value = float(self.speed.removesuffix("x"))
        return original / value if self.speed.endswith("x") else 1 / value


@dataclass(frozen=True)
class Allowance:
    """What a plan may take beyond the original when it runs, as far as it is limited; below zero: it must save."""

    seconds: float | None  # of a decode step
    resident: int | None  # bytes
