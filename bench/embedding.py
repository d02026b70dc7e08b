"""What feedback is worth in the embedding: nearest rounding against the head's moment at several dampings.

    python bench/embedding.py MODEL CALIBRATION_TEXT TEST_TEXT [--codecs IQ4_NL Q4_0 --tokens 16384 --windows 4]

Only the table (of a model that ties embedding and head) is compressed; KL on the first windows of the test text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.solve import Metric, nearest, solve
from supremum.stats.streaming import BlockStream
from supremum.stats.sweep import HEAD_MOMENTS, sweep
from supremum.text import fast_dtype, tokens_from_text
from supremum.text.windows import read_windows
from supremum.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--codecs", nargs="+", default=["IQ4_NL", "Q4_0"])
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.01, 0.1, 0.5])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    stream = BlockStream(checkpoint, dtype=fast_dtype())
    windows = tokens_from_text(checkpoint, [args.calibration], tokens=args.tokens, length=512)
    test = read_windows(checkpoint, [args.test], length=1024, wanted=args.windows)[:args.windows]
    reference = final_hidden(stream, test)
    table, = stream.tables()
    weight_VD = checkpoint.read(table).float()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "work", {})
        sweep(stream, windows, workspace)
        moment_DD = workspace.load(HEAD_MOMENTS)["S"]
    for name in args.codecs:
        codec = codecs.get(name)
        ways = {"nearest": nearest(weight_VD, codec)} | {
            f"damping {damping}": solve(weight_VD, Metric.of(moment_DD, damping=damping), codec, refits=0)
            for damping in args.dampings}
        for way, coded in ways.items():
            decoded_VD = coded.decode()
            quality = streamed_quality(stream, test, reference,
                                       lambda tensor, decoded_VD=decoded_VD: decoded_VD if tensor == table else None)
            print(f"{name} {way}: KL {quality.kl_mean:.4f} +- {quality.kl_se:.4f}", flush=True)


if __name__ == "__main__":
    main()
