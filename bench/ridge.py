"""What drift correction is worth, and how much of it the calibration text supports.

    python bench/ridge.py MODEL CALIBRATION_TEXT TEST_TEXT [--codec int4-g64 --tokens 16384 --ridges 0.01 0.05 0.2]

Solves every linear layer of the blocks in one codec, without correction and with it at several ridges, and prints KL on the
first windows of the test text (bfloat16, run block by block). About 6 minutes a row for 135 M parameters on one busy core.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from supremum.checkpoint import open_checkpoint
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.solve import final
from supremum.solve.candidates import load_coded
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
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--ridges", type=float, nargs="+", default=[0.01, 0.05, 0.2])
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    windows = tokens_from_text(checkpoint, [args.calibration], tokens=args.tokens, length=512)
    test = read_windows(checkpoint, [args.test], length=1024, wanted=args.windows)[:args.windows]
    stream = BlockStream(checkpoint, dtype=fast_dtype())
    shapes = {name: shape for name, (shape, turned) in orientation(stream).items() if not turned}
    plan = {name: args.codec for name in shapes if name not in stream.table_names()}
    corrected = final._solve_block

    def uncorrected(block: Any, call: Any, original_NTd: Any, *rest: Any) -> Any:
        return corrected(block, call, None, *rest)

    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "work", {})
        sweep(stream, windows, workspace)
        reference = final_hidden(stream, test)
        for ridge in [None, *args.ridges]:
            final._solve_block = uncorrected if ridge is None else corrected
            final.RIDGE = ridge or final.RIDGE
            files = final.solve_final(stream, windows, workspace, plan, lambda name: checkpoint.read(name).float(), shapes,
                                      f"ridge-{ridge}", {})

            def weight(files: dict[str, str], name: str) -> torch.Tensor | None:
                if name not in files:
                    return None
                return load_coded(workspace, files[name], f"{name}|{args.codec}", args.codec, shapes[name]).decode()

            quality = streamed_quality(stream, test, reference, partial(weight, files))
            print(f"{args.codec} ridge {ridge}: KL {quality.kl_mean:.4f} +- {quality.kl_se:.4f}", flush=True)


if __name__ == "__main__":
    main()
