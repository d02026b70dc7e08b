"""What smoothing is worth where inputs are rounded: KL with and without, every linear layer of the blocks rounded to nearest.

    python bench/smoothing.py MODEL CALIBRATION_TEXT TEST_TEXT [--codecs int8-channel-a8 fp8-channel-a8 --windows 4]

Float32, no error feedback, factors from 2,048 tokens of the calibration text; KL on windows of 512 tokens of the test text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.solve.cancellation import nearest
from supremum.solve.smoothing import TOKENS, smoothed
from supremum.stats.streaming import BlockStream, orientation
from supremum.text import tokens_from_text
from supremum.text.windows import read_windows
from supremum.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--codecs", nargs="+", default=["int8-channel-a8", "fp8-channel-a8"])
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    stream = BlockStream(checkpoint, dtype=torch.float32)
    windows = tokens_from_text(checkpoint, [args.calibration], tokens=TOKENS, length=512)
    test = read_windows(checkpoint, [args.test], length=512, wanted=args.windows)[:args.windows]
    reference = final_hidden(stream, test)
    names = {name for name, (_, turned) in orientation(stream).items() if not turned and name not in stream.table_names()}
    print("| codec | KL without | with | pairs | folded in s |\n|---|---|---|---|---|", flush=True)
    for codec in args.codecs:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            view, record = smoothed(stream, windows, {name: [codec] for name in names},
                                    Workspace(Path(folder) / "work", {}))
            seconds = time.perf_counter() - start
            cells = []
            for model in (checkpoint, view):
                quality = streamed_quality(
                    BlockStream(model, dtype=torch.float32), test, reference,
                    lambda name, model=model, codec=codec: nearest(model.read(name).float(), codecs.get(codec)).decode()
                    if name in names else None, "measure", lambda name, codec=codec: codec if name in names else None)
                cells.append(f"{quality.kl_mean:.4f} ± {quality.kl_se:.4f}")
            folded = sum(pair["exponent"] is not None for pair in record["pairs"])
            print(f"| {codec} | {' | '.join(cells)} | {folded} of {len(record['pairs']) + len(record['not_folded'])} | "
                  f"{seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
