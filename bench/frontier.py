"""Our files and nearest rounding at equal bytes, scored by an external referee script.

    python bench/frontier.py REFERENCE CALIBRATION_TEXT TEST_TEXT --referee REFEREE.py [--tokens 24576] [--rows gguf int4 ...]

REFERENCE: a Hugging Face folder. The referee is any script that takes REFERENCE CANDIDATE TEXT and prints one JSON document
with kl_mean, kl_standard_error, perplexity_candidate and bytes. Each row is written by the product's own command path; the
nearest-rounding rows by the stock encoder (`gguf`) or by absmax scales. Times are wall seconds of the whole run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import torch

from supremum import codecs
from supremum.allocate import Budget
from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.checkpoint.targets import LazyCoded, target
from supremum.codecs import Coded, Grid
from supremum.output import convert
from supremum.pipeline import optimize
from supremum.stats.streaming import BlockStream, orientation

ROWS = ("gguf", "int4", "int3", "int2", "archive-4", "archive-3", "archive-2.55", "archive-2.1")


def nearest_q4_0(weight_OI: torch.Tensor) -> Coded:
    """Q4_0 as the `gguf` library encodes it."""
    blocks = gguf.quants.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType.Q4_0)
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    return Coded(codecs.get("Q4_0"), {"blocks": torch.from_numpy(blocks.copy())}, shape)


def absmax(weight_OI: torch.Tensor, name: str) -> Coded:
    """Symmetric integers with the scale that reaches the largest weight, nearest rounding."""
    codec = codecs.get(name)
    high = float(codec.levels[-1])
    group_OGS = weight_OI.view(weight_OI.shape[0], -1, codec.step)
    grid: Grid = codec.project(group_OGS.abs().amax(-1) / high, None)
    level = (group_OGS / grid.scale_OG[..., None]).round().clamp(float(codec.levels[0]), high)
    codes_OI = (level - codec.levels[0]).to(torch.uint8).view_as(weight_OI)
    return Coded(codec, codec.pack(codes_OI, grid), (weight_OI.shape[0], weight_OI.shape[1]))


def write_plain(checkpoint: Checkpoint, folder: Path, kind: str, name: str, tables: bool) -> Path:
    """Every matrix of the blocks (and the embedding) by nearest rounding, written by the target."""
    shapes = orientation(BlockStream(checkpoint, dtype=torch.float32))
    inner = {n for n in shapes if tables or ".layers." in n}

    def code(tensor: str) -> Coded:
        weight_OI = checkpoint.read(tensor).float()
        return nearest_q4_0(weight_OI) if kind == "gguf" else absmax(weight_OI, name)

    folder.mkdir(parents=True)
    return target(kind).write(checkpoint, LazyCoded(dict.fromkeys(sorted(inner), name), code), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("test", type=Path)
    parser.add_argument("--referee", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.reference)
    print("| file | bytes | KL | +- | perplexity | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def row(label: str, path: Path, seconds: float, nbytes: int | None = None) -> dict[str, float]:
            done = subprocess.run([sys.executable, str(args.referee), str(args.reference), str(path), str(args.test),
                                   "--windows", str(args.windows)], capture_output=True, text=True, check=True)
            found: dict[str, float] = json.loads(done.stdout)
            print(f"| {label} | {nbytes or found['bytes']} | {found['kl_mean']:.4f} | {found['kl_standard_error']:.4f} | "
                  f"{found['perplexity_candidate']:.2f} | {seconds:.0f} |", flush=True)
            return found

        def ours(label: str, budget: Budget, **options: object) -> dict[str, float]:
            start = time.perf_counter()
            out = folder / label.replace(" ", "-")
            result = optimize(args.reference, budget, text=[args.calibration], tokens=args.tokens, out=out, **options)
            return row(label, out / result.document["result"]["file"], time.perf_counter() - start)

        def archive(bits: float) -> None:
            """The tables stay as they are; the referee, which knows no archives, is given its floats."""
            start = time.perf_counter()
            out = folder / f"archive-{bits}"
            optimize(args.reference, Budget(bits=bits), text=[args.calibration], tokens=args.tokens, out=out,
                     target="archive", keep=BlockStream(checkpoint, dtype=torch.float32).tables())
            seconds = time.perf_counter() - start
            floats = convert(out, "compressed-tensors", folder / f"floats-{bits}")
            row(f"archive, ours, {bits:g} bits as written", floats, seconds, (out / "model.safetensors").stat().st_size)

        for name in args.rows:
            if name.startswith("archive-"):
                archive(float(name.removeprefix("archive-")))
            elif name == "gguf":
                plain = write_plain(checkpoint, folder / "q4_0", "gguf", "Q4_0", True)
                nearest = row("Q4_0, nearest, uniform", plain, 0.0)
                size = plain.stat().st_size
                found = ours("ours at the same bytes", Budget(size=size))
                ours("ours without allocation (IQ4_NL)", Budget(size=size), only=["IQ4_NL"])
                print(f"\nours / nearest: {found['kl_mean'] / nearest['kl_mean']:.3f}\n", flush=True)
            else:
                codec = f"{name}-g64"
                bits = int(name.removeprefix("int")) + 0.25
                plain = write_plain(checkpoint, folder / f"plain-{name}", "compressed-tensors", codec, False)
                nearest = row(f"{codec}, nearest, absmax", plain, 0.0)
                found = ours(f"{codec}, ours", Budget(bits=bits + 0.01), target="compressed-tensors", only=[codec])
                print(f"\nours / nearest: {found['kl_mean'] / nearest['kl_mean']:.3f}\n", flush=True)


if __name__ == "__main__":
    main()
