"""What each part of the archive's solver is worth, and how fast its integers are decoded.

    python bench/water.py MODEL CALIBRATION_TEXT TEST_TEXT [--bits 3 --tokens 24576 --windows 16] [--ways columns ...]

Every linear layer of the blocks is solved at the water level that gives the bits (as written, tables included): with the
columns' steps alone (WaterSIC, each layer at its own mean Fisher), with rows' steps by diag B, with feedback between rows by
B, and the last under other dampings of S and of B. KL on the first windows of the test text, block by block. Then one core's
speed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from supremum import fill
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.archive import Encoder
from supremum.checkpoint.targets import target
from supremum.codecs import rans
from supremum.gather import gather, gather_fisher
from supremum.limits import Curve
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.solve.water import Outputs
from supremum.text.windows import read_windows
from supremum.workspace import Workspace


def columns(fisher: torch.Tensor, damping: float) -> Outputs:
    """All rows alike."""
    found = rows(fisher, damping)
    return Outputs(found.order_O, found.pivot_O.log().mean().exp().expand(len(fisher)).clone(), None)


def rows(fisher: torch.Tensor, damping: float) -> Outputs:
    """diag B."""
    return Outputs.of(fisher.diagonal().clone() if fisher.ndim == 2 else fisher, damping)


WAYS = {"columns": (columns, 0.1, 1.0), "rows by diag B": (rows, 0.1, 1.0),
        "feedback between rows by B": (Outputs.of, 0.1, 1.0),
        "S damped by 0.03": (Outputs.of, 0.03, 1.0), "S damped by 0.3": (Outputs.of, 0.3, 1.0),
        "B damped by 0.01": (Outputs.of, 0.1, 0.01), "B damped by 0.1": (Outputs.of, 0.1, 0.1),
        "B damped by 0.4": (Outputs.of, 0.1, 0.4), "B damped by 3": (Outputs.of, 0.1, 3.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    checkpoint, kind = open_checkpoint(args.model), target("archive")
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch) / "work", {})
        gathered = gather(checkpoint, workspace, text=[args.calibration], tokens=args.tokens, seed=0, dtype="auto")
        gather_fisher(gathered, 0)
        names = [name for name in gathered.shapes if name not in gathered.stream.tables()]
        weights = sum(gathered.shapes[name][0] * gathered.shapes[name][1] for name in names)
        level = 2.0 ** Curve(list(gathered.spectra())).level_at_bits(args.bits - fill.START_BITS)
        test = read_windows(checkpoint, [args.test], length=512, wanted=args.windows)[:args.windows]
        reference = final_hidden(gathered.stream, test)
        print("| way | bits | KL | +- | at the bits asked for | solved in s |\n|---|---|---|---|---|---|", flush=True)
        for way in args.ways:
            outputs, damping, output_damping = WAYS[way]
            fill.Outputs = SimpleNamespace(of=outputs)  # type: ignore[misc, assignment]
            fill.DAMPING, fill.OUTPUT_DAMPING = damping, output_damping  # type: ignore[misc]
            for attempt in range(3):
                start = time.perf_counter()
                solved = fill.solve_level(gathered, kind, names, math.log2(level), f"{way}{attempt}", drift=False)  # type: ignore[arg-type]
                seconds = time.perf_counter() - start
                bits = 8 * sum(solved.nbytes[name] for name in names) / weights
                if abs(bits - args.bits) < 0.01:
                    break
                level *= 4.0 ** (bits - args.bits)
            quality = streamed_quality(gathered.stream, test, reference, partial(_decoded, solved))
            print(f"| {way} | {bits:.3f} | {quality.kl_mean:.4f} | {quality.kl_se:.4f} | "
                  f"{quality.kl_mean * 4 ** (bits - args.bits):.4f} | {seconds:.0f} |", flush=True)
        _speed(solved, names)


def _decoded(solved: fill.Solved, name: str) -> torch.Tensor | None:
    return solved.coded[name].decode() if name in solved.coded else None


def _speed(solved: fill.Solved, names: list[str]) -> None:
    """One core, a block's worth of matrices."""
    torch.set_num_threads(1)
    encoder, some = Encoder(), names[:70]
    for name in some:
        encoder.count(name, solved.coded[name])  # type: ignore[arg-type]
    matrices = {name: solved.coded[name] for name in some}
    size = sum(matrix.integers_OI.numel() for matrix in matrices.values())  # type: ignore[attr-defined]
    streams = {name: encoder.encode(matrix)[".codes"].numpy().view("uint32") for name, matrix in matrices.items()}  # type: ignore[arg-type]
    table = rans.decoding_table(encoder.frequencies)[:88]
    for label, work in (
            ("encode", lambda name, matrix: encoder.encode(matrix)),
            ("decode to integers", lambda name, matrix: rans.decode(
                streams[name], matrix.frame.row_class_O.numpy(), matrix.frame.column_class_I.numpy(), table)),
            ("scale to floats", lambda name, matrix: matrix.decode())):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            for name, matrix in matrices.items():
                work(name, matrix)
            seconds.append(time.perf_counter() - start)
        rate = size / sorted(seconds)[1] / 1e6
        print(f"{label}: {rate:.0f} M weights/s, {2 * rate:.0f} MB/s of bfloat16, one core", flush=True)


if __name__ == "__main__":
    main()
