"""Which peers stand beside which row of bench/frontier.py, how one is run, and how files are weighed alike.

A peer is run where install.py put it, DIR/PEER/bin/python, on the reference and the calibration text that ours get, as many
tokens of it, and what it leaves is scored by the same referee.
"""

from __future__ import annotations

import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open

from supremum.checkpoint.gguf_header import read_header

SCRIPTS = Path(__file__).parent
ROWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gguf": (("llamacpp", "--kind", "Q4_0"), ("llamacpp", "--kind", "IQ4_NL")),
    "gguf-least": (("llamacpp", "--kind", "Q2_K"), ("llamacpp", "--kind", "IQ2_XXS"), ("llamacpp", "--kind", "Q2_0")),
    "int4": (("autoround",), ("llmcompressor",), ("gptqmodel",), ("hqq",), ("quanto",)),
    "int3": (("autoround",), ("llmcompressor",), ("gptqmodel",), ("hqq",)),
    "int2": (("autoround",), ("llmcompressor",), ("gptqmodel",), ("hqq",), ("quanto",)),
}


class PeerError(Exception):
    """A peer that failed, with the last line that it said."""


def installed(row: str, folder: Path) -> list[tuple[str, ...]]:
    """The row's peers that have an environment in the folder."""
    return [peer for peer in ROWS.get(row, ()) if (folder / peer[0] / "bin/python").exists()]


def run(peer: tuple[str, ...], folder: Path, reference: Path, text: str, out: Path, bits: int, tokens: int) -> dict[str, Any]:
    """What the peer's script says of itself (peers/common.py); its trouble as PeerError."""
    name, *options = peer
    python, script = folder.absolute() / name / "bin/python", SCRIPTS / f"peer_{name}.py"
    command = [python, script, reference, text, out, "--bits", bits, "--tokens", tokens, *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"{name}: " + (done.stderr.strip() or "no message").splitlines()[-1])
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def linear(file: Path) -> int:
    """Bytes of the blocks' matrices as they lie in a .gguf or in a folder's safetensors, with all that decodes them."""
    if file.suffix == ".gguf":
        return sum(t.nbytes for t in read_header(file).tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2)
    total = 0
    for part in file.glob("*.safetensors"):
        with safe_open(part, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                if ".layers." in key and "norm" not in key:
                    tensor = opened.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total


def bits_at(points: list[tuple[float, float]], kl: float) -> float | None:
    """Bits a weight at which the best of the points (bits, KL) would have this KL: log KL is linear in bits between two.

    Points that another beats at no more bits are passed over; None beyond the ends.
    """
    front: list[tuple[float, float]] = []
    for bits, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((bits, value))
    for (bits, above), (further, below) in pairwise(front):
        if below <= kl <= above:
            return bits + (further - bits) * math.log(above / kl) / math.log(above / below)
    return None
