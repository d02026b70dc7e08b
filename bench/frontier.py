"""Our files, nearest rounding and the peers' files at equal bytes, scored by an external referee script.

    python bench/frontier.py REFERENCE CALIBRATION_TEXT TEST_TEXT --referee REFEREE.py [--tokens 32768] [--rows gguf int4 ...]
                             [--kinds IQ2_XXS ...] [--peers DIR] [--dtype float32] [--seed 1]

REFERENCE: a Hugging Face folder. The referee is any script that takes REFERENCE CANDIDATE TEXT and prints one JSON document
with kl_mean, kl_standard_error, perplexity_candidate and bytes. Each row is written by the product's own command path; the
nearest-rounding rows by the stock encoder (`gguf`) or by absmax scales; those of `imatrix` by llama.cpp's kernels with an
importance matrix. --peers: a folder of environments that bench/peers/install.py made; each peer in it runs on the same text
beside its row. Beside llama.cpp ours leave the embedding at bfloat16, too, and are given the bytes of its file. Our seconds
are of the whole run; how much of it was quantising, not the limit, the proof and the report, is said below. A peer's are of
its quantising alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from peers import rows as peers

from supremum import codecs
from supremum.allocate import Budget
from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.checkpoint.gguf_header import read_header
from supremum.checkpoint.targets import LazyCoded, target
from supremum.codecs import Coded, Grid
from supremum.errors import SupremumError
from supremum.output import convert
from supremum.pipeline import optimize
from supremum.stats.streaming import BlockStream, orientation

AROUND = ("check what is needed", "rehearse export and reload", "analyse the layers", "measure the machine", "write",
          "prove in the stock runtime", "write samples")  # phases of a run that are not quantising
REPORTED = ("Fisher of the head", "gather Fisher", "measure the result", "price the layers")  # of --quick: serve the report
KINDS = ("Q4_0", "IQ4_NL", "Q2_K", "IQ3_XXS", "IQ2_XXS", "IQ1_S", "Q2_0")  # of llama.cpp
ROWS = ("gguf", "imatrix", "gguf-least", "int4", "int3", "int2", "archive-4", "archive-3", "archive-2.55", "archive-2.1")


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


def clock() -> tuple[float, float]:
    """Wall and processor seconds, those of ended children with them."""
    return time.perf_counter(), sum(os.times()[:4])


def since(start: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def readable(path: Path) -> Path:
    """What a referee of stock libraries opens: of a .gguf with types that the `gguf` library lacks, its floats."""
    if path.suffix != ".gguf" or all(t.type.name in gguf.GGMLQuantizationType.__members__
                                     for t in read_header(path).tensors.values()):
        return path
    return convert(path, "compressed-tensors", path.parent / "floats")


class Table:
    """The rows, each printed when it is scored; what later rows need of earlier ones."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.checkpoint = open_checkpoint(args.reference)
        stream = BlockStream(self.checkpoint, dtype=torch.float32)
        self.tables = stream.tables()
        shapes = {name: shape for name, (shape, _) in orientation(stream).items()}
        self.weights = sum(o * i for name, (o, i) in shapes.items() if name not in self.tables)
        self.fixed: list[tuple[float, float]] = []  # bits and KL of the peers' files
        print("| file | bytes | of them the linear layers | KL | +- | perplexity | seconds | CPU seconds |\n"
              "|---|---|---|---|---|---|---|---|", flush=True)

    def row(self, label: str, path: Path, spent: tuple[float, float] = (0.0, 0.0), nbytes: int | None = None,
            linear: int | None = None) -> dict[str, float]:
        args = self.args
        done = subprocess.run([sys.executable, str(args.referee), str(args.reference), str(readable(path)), str(args.test),
                               "--windows", str(args.windows), "--dtype", args.dtype],
                              capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        found["linear"] = linear or peers.linear(path)
        nbytes = nbytes or (path.stat().st_size if path.is_file() else int(found["bytes"]))
        print(f"| {label} | {nbytes} | {found['linear']:.0f} | {found['kl_mean']:.4f} | "
              f"{found['kl_standard_error']:.4f} | {found['perplexity_candidate']:.2f} | {spent[0]:.0f} | {spent[1]:.0f} |",
              flush=True)
        return found

    def optimized(self, name: str, budget: Budget, **options: Any) -> tuple[Path, dict[str, Any], tuple[float, float]]:
        args, start, out = self.args, clock(), self.folder / name
        result = optimize(args.reference, budget, text=[args.calibration], tokens=args.tokens, out=out, seed=args.seed,
                          **options)
        return out, dict(result.document), since(start)

    def ours(self, label: str, budget: Budget, **options: Any) -> dict[str, float]:
        """The row; "quantising": its wall seconds in which nothing was proved, drawn or reported."""
        out, document, spent = self.optimized(label.replace(" ", "-"), budget, **options)
        around = (*AROUND, *REPORTED) if options.get("quick") else AROUND
        rest = sum(phase["seconds"] for phase in document["phases"] if phase["name"] in around)
        return self.row(label, out / document["result"]["file"], spent) | {"quantising": spent[0] - rest}

    def archive(self, bits: float) -> None:
        """The tables stay as they are; the referee, which knows no archives, is given its floats."""
        out, _, spent = self.optimized(f"archive-{bits}", Budget(bits=bits), target="archive", keep=self.tables)
        floats = convert(out, "compressed-tensors", self.folder / f"floats-{bits}")
        nbytes = (out / "model.safetensors").stat().st_size
        found = self.row(f"archive, ours, {bits:g} bits as written", floats, spent, nbytes, peers.linear(out))
        mine, theirs = found["linear"] * 8 / self.weights, peers.bits_at(self.fixed, found["kl_mean"])
        if theirs is not None:
            print(f"\n{mine:.3f} bits; peers' files have this KL at {theirs:.3f}: {theirs - mine:.3f} fewer\n", flush=True)

    def beside(self, name: str, found: dict[str, float] | None, bits: int) -> None:
        """The installed peers of the row, and ours against each: `found`, or else ours at the bytes of the peer's file."""
        args = self.args
        for peer in peers.installed(name, args.peers) if args.peers else ():
            out = self.folder / f"{name}-{'-'.join(peer)}"
            try:
                said = peers.run(peer, args.peers, args.reference, args.calibration, out, bits, args.tokens)
                label = " ".join([said["peer"], said["version"], *peer[2:]])
                theirs = self.row(label, Path(said["file"]), (said["seconds"], said["cpu_seconds"]), said.get("bytes_file"),
                                  said["bytes_linear"])
                self.fixed.append((said["bytes_linear"] * 8 / self.weights, theirs["kl_mean"]))
                mine = found or self.ours(f"ours at the bytes of {label}", Budget(size=said["bytes_file"]), keep=self.tables)
            except (peers.PeerError, SupremumError) as trouble:  # the other rows are worth having
                print(f"\n{trouble}\n", flush=True)
                continue
            print(f"\nours / {label}: KL {mine['kl_mean'] / theirs['kl_mean']:.3f} at "
                  f"{mine['linear'] / theirs['linear']:.4f} of the bytes\n", flush=True)

    def gguf(self) -> None:
        plain = write_plain(self.checkpoint, self.folder / "q4_0", "gguf", "Q4_0", True)
        nearest = self.row("Q4_0, nearest, uniform", plain)
        size = plain.stat().st_size
        found = self.ours("ours at the same bytes", Budget(size=size))
        self.ours("ours without allocation (IQ4_NL)", Budget(size=size), only=["IQ4_NL"])
        print(f"\nours / nearest: {found['kl_mean'] / nearest['kl_mean']:.3f}\n", flush=True)
        self.beside("gguf", None, 4)

    def imatrix(self) -> None:
        """llama.cpp's kernels with an importance matrix, and ours at the bytes of each file."""
        import ggml  # needs the gguf extra, as no other row does

        args, ours = self.args, dict[int, dict[str, float]]()
        for kind in args.kinds:
            start = clock()
            folder = self.folder / f"imatrix-{kind}"
            path = ggml.write(self.checkpoint, kind, args.calibration, args.tokens, args.seed, folder)
            theirs, size = self.row(f"{kind}, ggml, importance matrix", path, since(start)), path.stat().st_size
            if size not in ours:
                ours[size] = self.ours(f"ours at the bytes of {kind}", Budget(size=size), keep=self.tables)
            print(f"\nours / {kind} of ggml: KL {ours[size]['kl_mean'] / theirs['kl_mean']:.3f}\n", flush=True)

    def integers(self, name: str) -> None:
        codec, bits = f"{name}-g64", int(name.removeprefix("int"))
        plain = write_plain(self.checkpoint, self.folder / f"plain-{name}", "compressed-tensors", codec, False)
        nearest = self.row(f"{codec}, nearest, absmax", plain)
        quick, found = (self.ours(f"{codec}, ours{' --quick' * quick}", Budget(bits=bits + 0.26), only=[codec],
                                  target="compressed-tensors", quick=quick) for quick in (True, False))
        print(f"\nours / nearest: {found['kl_mean'] / nearest['kl_mean']:.3f}; quantising took {found['quantising']:.0f} s, "
              f"with --quick {quick['quantising']:.0f} s\n", flush=True)
        self.beside(name, found, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("test", type=Path)
    parser.add_argument("--referee", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64 * 512)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other windows of the calibration text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="of the referee's forward passes: float32 is the faster "
                        "where the processor has no bfloat16 units")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="llama.cpp's types of the rows `imatrix`")
    parser.add_argument("--peers", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table = Table(args, Path(scratch))
        for name in args.rows:
            if name.startswith("archive-"):
                table.archive(float(name.removeprefix("archive-")))
            elif name == "gguf":
                table.gguf()
            elif name == "imatrix":
                table.imatrix()
            elif name == "gguf-least":
                table.beside(name, None, 2)
            else:
                table.integers(name)


if __name__ == "__main__":
    main()
