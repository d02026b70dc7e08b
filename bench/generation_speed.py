"""Tokens a second of self-generated calibration text, per batch size, beside Transformers' own caches.

    python bench/generation_speed.py MODEL [--length 512] [--batches 32 64 96] [--threads N] [--dtype bfloat16]

Every figure is for whole rows of --length tokens from an empty context, sampling included, loading left out.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from transformers import DynamicCache, StaticCache

from supremum.checkpoint import open_checkpoint
from supremum.text.decode import Decoder
from supremum.text.generate import Starts, fast_dtype, write


class Peer:
    """Decoding with Transformers' own cache and attention."""

    def __init__(self, model, cache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def step(self, tokens):
        return self.model(input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--caches", nargs="+", default=["supremum", "dynamic", "static"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype()

    checkpoint = open_checkpoint(args.model)
    print(f"{args.length} tokens a row, {dtype}, {args.threads} threads; load average {os.getloadavg()[0]:.1f}")
    for name in args.caches:
        for batch in args.batches:
            model = checkpoint.model(dtype)
            starts = Starts.of(checkpoint.tokenizer(), model, checkpoint.config.get_text_config().vocab_size)
            if name == "supremum":
                step = Decoder(model).step
            else:
                cache = DynamicCache(config=model.config) if name == "dynamic" else StaticCache(
                    config=model.config, max_cache_len=args.length)
                step = Peer(model, cache).step
            start, cpu = time.perf_counter(), time.process_time()
            write(step, starts, [False, True] * (batch // 2), length=args.length,
                  generator=torch.Generator().manual_seed(0))
            wall, cpu, count = time.perf_counter() - start, time.process_time() - cpu, batch // 2 * 2 * args.length
            print(f"{name:<10} batch {batch:<4} {count / wall:7.0f} tokens/s   {cpu / count * 1e3:.2f} ms of CPU a token",
                  flush=True)


if __name__ == "__main__":
    main()
