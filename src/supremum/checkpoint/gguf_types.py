"""The types of a GGUF file's tensors: those of the `gguf` library, and what llama.cpp stores besides."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES


@dataclass(frozen=True)
class Kind:
    """`number`: in the file. `block`: weights that are stored together, in so many bytes."""

    name: str
    number: int
    block: int
    nbytes: int


KINDS: dict[str, Kind] = {"Q2_0": Kind("Q2_0", 42, 64, 18)}  # ggml/include/ggml.h; not in gguf 0.19
KINDS |= {kind.name: Kind(kind.name, int(kind), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
NUMBERED = {kind.number: kind for kind in KINDS.values()}
