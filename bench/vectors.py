"""GGUF's vector types on one matrix: llama.cpp's kernel with an importance matrix against ours, in the same bytes.

    python bench/vectors.py MODEL TEXT [--layer model.layers.14.mlp.down_proj] [--tokens 8192] [--types IQ2_XXS ...]

Errors are tr(dW S dW^T) / tr(W S W^T) with S of the calibration windows and with S of as many held-out ones. ggml: the kernel
that llama-quantize calls, told diag S. nearest: ours without feedback. feedback: cancellation with one refit of the scales.
descent: what the product does then, with B = I. Seconds of one core, what is loaded once left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ggml import quantized
from torch import Tensor

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.codecs import Coded
from supremum.solve import Metric, distortion, solve
from supremum.solve.descent import descend
from supremum.stats.streaming import BlockStream
from supremum.stats.sweep import moments, sweep
from supremum.text.windows import calibration_and_held_out
from supremum.workspace import Workspace

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layer", default="model.layers.14.mlp.down_proj")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration, and as many held out")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--work", type=Path, help="keep the moments here; a later run goes on from them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(args.model)
    weight_OI = checkpoint.read(f"{args.layer}.weight").float()
    with tempfile.TemporaryDirectory() as temporary:
        moment_II, held_out_II = gathered(checkpoint, args, args.work or Path(temporary))
    metric = Metric.of(moment_II)

    def error(coded: Coded, second_II: Tensor) -> float:
        return distortion(weight_OI - coded.decode(), second_II) / distortion(weight_OI, second_II)

    print("| type | bits | ggml | nearest | feedback | descent | ours / ggml | ggml, held-out | ours, held-out | ours / ggml "
          "| ggml, s | ours, s |\n" + "|---" * 12 + "|", flush=True)
    for name in args.types:
        found, seconds = solved(weight_OI, moment_II, metric, name)
        seen = {way: error(coded, moment_II) for way, coded in found.items()}
        unseen = {way: error(found[way], held_out_II) for way in ("ggml", "descent")}
        print(f"| {name} | {codecs.bits_per_weight(codecs.get(name), found['ggml'].shape):.4f} | "
              + " | ".join(f"{value:.4f}" for value in seen.values())
              + f" | {seen['descent'] / seen['ggml']:.3f} | {unseen['ggml']:.4f} | {unseen['descent']:.4f} | "
              f"{unseen['descent'] / unseen['ggml']:.3f} | {seconds['ggml']:.1f} | "
              f"{seconds['feedback'] + seconds['descent']:.1f} |", flush=True)


def solved(weight_OI: Tensor, moment_II: Tensor, metric: Metric, name: str) -> tuple[dict[str, Coded], dict[str, float]]:
    """The matrix by each way, and the way's seconds. A first row alone loads and compiles what the way needs."""
    codec = codecs.get(name)
    ways: dict[str, Callable[[Tensor, Coded | None], Coded]] = {
        "ggml": lambda weight, before: quantized(weight, name, moment_II.diagonal()),
        "nearest": lambda weight, before: solve(weight, metric, codec, feedback=False),
        "feedback": lambda weight, before: solve(weight, metric, codec),
        "descent": lambda weight, before: descend(before, weight, metric.moment_II, torch.ones(len(weight)))}
    found: dict[str, Coded] = {}
    seconds, first = {}, None
    for way, make in ways.items():
        first = make(weight_OI[:1], first)
        start = time.process_time()
        found[way] = make(weight_OI, found.get("feedback"))
        seconds[way] = time.process_time() - start
    return found, seconds


def gathered(checkpoint: object, args: argparse.Namespace, work: Path) -> tuple[Tensor, Tensor]:
    """S of the layer's inputs over calibration and over held-out windows."""
    stream = BlockStream(checkpoint, dtype=torch.float32)
    block = next(block for block in stream.blocks if args.layer.startswith(f"{block}."))
    found = []
    for side, windows in zip(("calibration", "held-out"), calibration_and_held_out(
            checkpoint, [args.text], tokens=args.tokens, held_out_tokens=args.tokens, length=args.length), strict=True):
        space = Workspace(work / side, {"tokens": args.tokens})
        sweep(stream, windows, space)
        sums, keys = moments(space, stream.calls(windows), block)
        found.append(sums[keys[args.layer.removeprefix(f"{block}.")]])
    return found[0], found[1]


if __name__ == "__main__":
    main()
