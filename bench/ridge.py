"""What drift correction is worth, and how much the calibration text supports: the ridge of the correction, the damping.

    python bench/ridge.py MODEL CALIBRATION_TEXT TEST_TEXT [--codec int4-g64 --tokens 16384 --settings none:0.1 3:0.1]

Solves every linear layer of the blocks in one codec, for each RIDGE:DAMPING (RIDGE "none": not corrected, which is GPTQ with
searched scales), and prints KL on the first windows of the test text (bfloat16, run block by block) and seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from supremum.checkpoint import open_checkpoint
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.solve import final
from supremum.solve.candidates import load_coded
from supremum.stats.fisher import fisher
from supremum.stats.streaming import BlockStream, orientation
from supremum.stats.sweep import sweep
from supremum.text import fast_dtype, tokens_from_text
from supremum.text.windows import read_windows
from supremum.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--codec", default="int4-g64")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=["none:0.1", "1:0.1", "3:0.1", "9:0.1", "3:0.03", "3:0.3"])
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    windows = tokens_from_text(checkpoint, [args.calibration], tokens=args.tokens, length=512)
    test = read_windows(checkpoint, [args.test], length=1024, wanted=args.windows)[:args.windows]
    stream = BlockStream(checkpoint, dtype=fast_dtype())
    shapes = {name: shape for name, (shape, turned) in orientation(stream).items() if not turned}
    plan = {name: args.codec for name in shapes if name not in stream.table_names()}
    corrected = final._targets
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "work", {})
        sweep(stream, windows, workspace)
        fisher(stream, windows, workspace, lambda name: {}, length=windows.shape[1], seed=0)
        reference = final_hidden(stream, test)
        for setting in args.settings:
            ridge, damping = setting.split(":")
            final._targets = corrected if ridge != "none" else lambda weights, drift: dict(weights)
            final.RIDGE, final.DAMPING = 0.0 if ridge == "none" else float(ridge), float(damping)
            start = time.perf_counter()
            files = final.solve_final(stream, windows, workspace, plan, lambda name: checkpoint.read(name).float(), shapes,
                                      setting, {})
            seconds = time.perf_counter() - start

            def weight(files: dict[str, str], name: str) -> torch.Tensor | None:
                if name not in files:
                    return None
                return load_coded(workspace, files[name], name, args.codec, shapes[name]).decode()

            quality = streamed_quality(stream, test, reference, partial(weight, files))
            print(f"{args.codec} ridge {ridge} damping {damping}: KL {quality.kl_mean:.4f} +- {quality.kl_se:.4f}, solved in "
                  f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
