"""The forward sweep against one plain forward pass of the same windows at the same precision, in turns.

    python bench/sweep_speed.py MODEL [--tokens 16384 --rounds 3]

The plain pass is Transformers' own model with its head, batch by batch as the sweep's; the sweep also writes hidden states
and moments. Prints seconds of each round and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from supremum.checkpoint import open_checkpoint
from supremum.stats.streaming import BlockStream
from supremum.stats.sweep import batches, sweep
from supremum.text import fast_dtype
from supremum.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    checkpoint, dtype = open_checkpoint(args.model), fast_dtype()
    vocabulary = checkpoint.config.get_text_config().vocab_size
    windows_NT = torch.randint(0, vocabulary, (args.tokens // args.length, args.length),
                               generator=torch.Generator().manual_seed(0))
    model = checkpoint.model(dtype)

    def plain() -> None:
        with torch.inference_mode():
            for part in batches(windows_NT):
                model(input_ids=windows_NT[part], use_cache=False)

    def swept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sweep(BlockStream(checkpoint, dtype=dtype), windows_NT, Workspace(Path(folder) / "work", {}))

    seconds: dict[str, list[float]] = {"plain": [], "sweep": []}
    for _ in range(args.rounds):
        for name, run in (("plain", plain), ("sweep", swept)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name} {seconds[name][-1]:.1f} s", flush=True)
    print(f"{dtype}, {windows_NT.numel()} tokens: sweep / plain forward = "
          f"{statistics.median(seconds['sweep']) / statistics.median(seconds['plain']):.2f}")


if __name__ == "__main__":
    main()
