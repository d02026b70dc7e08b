"""What the final solve's parts are worth, and how much the calibration text supports of each.

    python bench/ridge.py MODEL CALIBRATION_TEXT TEST_TEXT [--codec int4-g64 --tokens 16384 --settings none:0.1:none 3:0.1:1]

Solves every linear layer of the blocks in one codec for each RIDGE:DAMPING:OUTPUTS, and prints KL on the first windows of the
test text (run block by block), seconds of the solve, and how many of these the descent took. RIDGE, of the drift correction:
"none" is GPTQ with searched scales. DAMPING of S. OUTPUTS: damping of B in the descent, "rows" for a descent of each row by
itself, "none" for none.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from supremum.checkpoint import open_checkpoint
from supremum.gather import Gathered, gather, gather_fisher
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.solve import descent, final
from supremum.solve.candidates import load_coded
from supremum.text.windows import read_windows
from supremum.workspace import Workspace


def output_fisher(gathered: Gathered, rows: bool, name: str) -> torch.Tensor:
    fisher = gathered.fisher_of(name)
    return fisher.diagonal() if rows and fisher.ndim == 2 else fisher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--codec", default="int4-g64")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=["none:0.1:none", "3:0.1:none", "3:0.1:rows", "3:0.1:1", "1:0.1:1",
                                                          "9:0.1:1", "3:0.03:1", "3:0.3:1"])
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    test = read_windows(checkpoint, [args.test], length=1024, wanted=args.windows)[:args.windows]
    corrected, descend = final._targets, descent.descend
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "work", {})
        gathered = gather(checkpoint, workspace, text=[args.calibration], tokens=args.tokens, seed=0, dtype="auto")
        gather_fisher(gathered, 0)
        stream = gathered.stream
        plan = {name: args.codec for name in gathered.shapes if name not in stream.tables()}
        reference = final_hidden(stream, test)
        for setting in args.settings:
            ridge, damping, outputs = setting.split(":")
            spent = [0.0]

            def timed(*arguments: Any, spent: list[float] = spent) -> Any:
                start = time.thread_time()
                found = descend(*arguments)
                spent[0] += time.thread_time() - start
                return found

            final.descend = timed
            final._targets = corrected if ridge != "none" else lambda weights, drift: dict(weights)
            final.RIDGE, final.DAMPING = 0.0 if ridge == "none" else float(ridge), float(damping)
            if outputs not in ("none", "rows"):
                descent.OUTPUT_DAMPING = float(outputs)
            grids = final.Grids(None if outputs == "none" else partial(output_fisher, gathered, outputs == "rows"))
            start = time.perf_counter()
            files = final.solve_final(stream, gathered.windows, workspace, plan, gathered.weight, gathered.shapes, setting,
                                      {}, grids)
            seconds = time.perf_counter() - start

            def weight(files: dict[str, str], name: str) -> torch.Tensor | None:
                if name not in files:
                    return None
                return load_coded(workspace, files[name], name, args.codec, gathered.shapes[name]).decode()

            quality = streamed_quality(stream, test, reference, partial(weight, files))
            print(f"{args.codec} ridge {ridge} damping {damping} outputs {outputs}: KL {quality.kl_mean:.4f} +- "
                  f"{quality.kl_se:.4f}, solved in {seconds:.0f} s, descent {spent[0]:.0f} s of a core", flush=True)


if __name__ == "__main__":
    main()
