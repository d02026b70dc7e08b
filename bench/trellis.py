"""How much of the quarter bit between integers and the rate-distortion bound the archive's trellis takes, in coded bytes.

    python bench/trellis.py [--rows 1024 --bits 1 2 3 4 5] [--library]

Normal numbers, independent, coded as the archive codes a matrix (solve/water.py, checkpoint/archive.py) and decoded again:
bits a weight of the stream, the gap to log2(1 / D) / 2, the gap of integers under an ideal entropy code at that rate
(limits/shaping.py), and one core's speed of the search, the coder and the decoder.

--library: the same symbols by the coder of constriction (pip install constriction), too. It is given them table by table,
which a decoder could not be: what table a number has depends on the one before. So it could not reach this speed here.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from supremum.checkpoint.archive import TABLES_OF, Encoder
from supremum.codecs import lattice, rans, trellis
from supremum.codecs.lattice import Lattice
from supremum.limits.shaping import entropy_coded_gap
from supremum.solve.water import flat

COLUMNS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 5.0])
    parser.add_argument("--library", action="store_true")
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
        if args.library:
            size, *seconds = by_library(found, encoder.frequencies[TABLES_OF[0]])
            own = 8 * parts[".codes"].nbytes / weight_OI.numel()
            print(f"  constriction: {8 * size / weight_OI.numel():.4f} bits (ours {own:.4f}); encode, decode, M weights/s: "
                  + ", ".join(f"{weight_OI.numel() / each / 1e6:.1f}" for each in seconds), flush=True)


def by_library(found: Lattice, frequencies: rans.Frequencies) -> tuple[int, float, float]:
    """Bytes, and CPU seconds there and back, of the symbols table by table."""
    from constriction import stream

    symbol_OI, quantiser_OI, _ = trellis.symbols(found.integers_OI.numpy())
    class_OI = found.frame.row_class_O.numpy()[:, None].astype(np.int64) + found.frame.column_class_I.numpy()
    table_N = (2 * class_OI.clip(0, lattice.CLASSES - 1) + quantiser_OI).ravel()
    order_N = table_N.argsort(kind="stable")
    parts = np.split(symbol_OI.ravel()[order_N].astype(np.int32), np.flatnonzero(np.diff(table_N[order_N])) + 1)
    models = [stream.model.Categorical(frequencies[table] / np.float64(rans.TOTAL), perfect=False)
              for table in np.unique(table_N)]

    def encode() -> Any:
        coder = stream.stack.AnsCoder()
        for part, one in zip(reversed(parts), reversed(models), strict=True):
            coder.encode_reverse(part, one)
        return coder.get_compressed()

    words, encoded = timed(encode)
    coder = stream.stack.AnsCoder(words)
    back, decoded = timed(lambda: [coder.decode(one, len(part)) for part, one in zip(parts, models, strict=True)])
    assert all((one == other).all() for one, other in zip(back, parts, strict=True))
    return words.nbytes, encoded, decoded


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


if __name__ == "__main__":
    main()
