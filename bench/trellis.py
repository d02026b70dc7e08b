"""How much of the quarter bit between integers and the rate-distortion bound the archive's trellis takes, in coded bytes.

    python bench/trellis.py [--rows 1024 --bits 1 2 3 4 5]

Normal numbers, independent, coded as the archive codes a matrix (solve/water.py, checkpoint/archive.py) and decoded again:
bits a weight of the stream, the gap to log2(1 / D) / 2, the gap of integers under an ideal entropy code at that rate
(limits/shaping.py), and one core's speed of the search, the coder and the decoder.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from supremum.checkpoint.archive import TABLES_OF, Encoder
from supremum.codecs import rans, trellis
from supremum.limits.shaping import entropy_coded_gap
from supremum.solve.water import flat

COLUMNS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 5.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    weight_OI = torch.randn(args.rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    flat(weight_OI[:8], 3.0)  # compile
    print("| bits | gap | of integers | taken | search | encode | decode, M weights/s |\n|---|---|---|---|---|---|---|")
    for wanted in args.bits:
        found, searched = timed(lambda wanted=wanted: flat(weight_OI, wanted))
        encoder = Encoder()
        encoder.count("w", found)
        encoder.encode(found)
        parts, encoded = timed(lambda encoder=encoder, found=found: encoder.encode(found))
        words, table = parts[".codes"].numpy().view("uint32"), rans.decoding_table(encoder.frequencies[TABLES_OF[0]])

        def decode(words: Any = words, table: Any = table, found: Any = found, parts: Any = parts) -> Any:
            symbols = rans.decode(words, found.frame.row_class_O.numpy(), found.frame.column_class_I.numpy(), table,
                                  trellis.NEXT_S2)
            return trellis.integers(symbols, parts[".escapes"].numpy() if ".escapes" in parts else symbols[:0, 0])

        decode()
        integers_OI, decoded = timed(decode)
        assert (torch.from_numpy(integers_OI) == found.integers_OI).all()
        bits = 8 * sum(part.nbytes for part in parts.values()) / weight_OI.numel()
        error = float((found.decode() - weight_OI).double().square().mean() / weight_OI.double().square().mean())
        gap, plain = bits + 0.5 * math.log2(error), entropy_coded_gap(bits).gap
        speeds = " | ".join(f"{weight_OI.numel() / seconds / 1e6:.1f}" for seconds in (searched, encoded, decoded))
        print(f"| {bits:.3f} | {gap:.3f} | {plain:.3f} | {plain - gap:.3f} | {speeds} |", flush=True)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


if __name__ == "__main__":
    main()
