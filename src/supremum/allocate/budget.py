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
    """

    size: int | None = None
    bits: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.size is None and self.bits is None and self.max_kl is None:
            raise BudgetError("no budget was given.", "Give a size, bits a weight or a largest KL.")
        for name, value in (("size", self.size), ("bits", self.bits), ("max_kl", self.max_kl)):
            if value is not None and not 0 < value < math.inf:
                raise BudgetError(f"{name} {value} is not a positive number.", "Give a finite number above zero.")

    @property
    def name(self) -> str:
        """For a folder: "size-75000000-max_kl-0.05"."""
        return "-".join(f"{name}-{value!r}" for name, value in asdict(self).items() if value is not None)
