"""How many bits above the limit each format spends, by nearest rounding and with error feedback.

    python bench/gaps.py MODEL TEXT [--blocks 4 14 25] [--codecs int4-g64 Q4_0 ...] [--tokens 16384] [--out FILE.md]

A layer's limit is reverse water-filling over S = E[x x^T] (B = I, a variance for each row and column of W). A code of R
bits a weight, scales included, with distortion D = tr(dW S dW^T) / (O I) has

    gap = R - R(D)        bits a weight

All codes are made with the calibration text's S. "calibration" takes D and the limit from that S, "held-out" takes both
from other windows of the text: what is left for text that the code has not seen. Beside them the gaps that an entropy-coded
uniform grid would have (limits.waterfill.Numbers), which need no code at all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from supremum import codecs
from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.limits import LayerSpectrum, metric, spectrum
from supremum.progress import track
from supremum.solve import Metric, distortion, nearest, solve_together
from supremum.stats.streaming import BlockStream, orientation
from supremum.stats.sweep import moments, sweep
from supremum.text.windows import calibration_and_held_out
from supremum.workspace import Workspace

CODECS = ("int8-g64", "int6-g64", "int5-g64", "int4-g64", "int3-g64", "int2-g64", "int4-g32", "int4-g128", "int4-channel",
          "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")
WAYS = ("nearest", "feedback")
Gaps = dict[tuple[str, str, str, str], list[float]]  # (codec, way, "calibration" or "held-out", layer kind) -> gaps

DAMPING = 0.01  # the usual one of GPTQ; the product takes more, for text of another kind


def limit_of(name: str, weight_OI: Tensor, moment_II: Tensor, tokens: int) -> LayerSpectrum:
    return spectrum(name, weight_OI, metric(moment_II, tokens=tokens), torch.ones(len(weight_OI)))


def block_gaps(checkpoint: Checkpoint, block: str, turned: dict[str, bool], names: list[str],
               sides: dict[str, tuple[dict[str, Tensor], dict[str, str]]], tokens: int, gaps: Gaps,
               predicted: dict[tuple[str, str], list[float]]) -> None:
    """Add the gaps of one block's layers. sides: "calibration" and "held-out" -> (moments by key, key by layer)."""
    sums, keys = sides["calibration"]
    for key, moment_II in sums.items():
        ready = Metric.of(moment_II, damping=DAMPING)
        for layer in (layer for layer, own in keys.items() if own == key):
            name = f"{block}.{layer}.weight"
            stored = checkpoint.read(name).float()
            weight_OI = stored.T.contiguous() if turned[name] else stored
            kind = layer.rsplit(".", 1)[-1]
            limits = {side: limit_of(name, weight_OI, found[key], tokens) for side, (found, _) in sides.items()}
            for way, gap in (limits["calibration"].numbers.gaps() if limits["calibration"].numbers else {}).items():
                predicted[kind, way].append(gap)
            for codec in map(codecs.get, names):
                if not codecs.fits(codec, (weight_OI.shape[0], weight_OI.shape[1])):
                    continue
                coded = {"nearest": nearest(weight_OI, codec),
                         "feedback": solve_together({"": weight_OI}, ready, codec)[""]}
                for way, code in coded.items():
                    change_OI = code.decode() - weight_OI
                    for side, limit in limits.items():
                        d = distortion(change_OI, sides[side][0][key]) / weight_OI.numel()
                        gaps[codec.name, way, side, kind].append(limit.gap_bits(8 * code.nbytes / weight_OI.numel(), d))


def mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "-"


def tables(gaps: Gaps, predicted: dict[tuple[str, str], list[float]], names: list[str], bits: dict[str, float]) -> str:
    kinds = list(dict.fromkeys(kind for kind, _ in predicted))
    lines = ["| codec | bits | layers | nearest | with feedback | nearest, held-out | with feedback, held-out |",
             "|---|---|---|---|---|---|---|"]

    def every(codec: str, way: str, side: str) -> list[float]:
        return [gap for kind in kinds for gap in gaps.get((codec, way, side, kind), [])]

    present = [codec for codec in names if every(codec, "nearest", "calibration")]
    for codec in present:
        cells = [mean(every(codec, way, side)) for side in ("calibration", "held-out") for way in WAYS]
        count = len(every(codec, "nearest", "calibration"))
        lines.append(f"| {codec} | {bits[codec]:.3f} | {count} | " + " | ".join(cells) + " |")
    lines += ["", "By kind of layer, with feedback, held-out:", "", "| codec | " + " | ".join(kinds) + " |",
              "|---" * (1 + len(kinds)) + "|"]
    for codec in present:
        lines.append(f"| {codec} | " + " | ".join(mean(gaps.get((codec, "feedback", "held-out", kind), []))
                                                  for kind in kinds) + " |")
    lines += ["", "Predicted from S alone for a uniform grid with an ideal entropy code:", "",
              "| algorithm | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for way in dict.fromkeys(way for _, way in predicted):
        lines.append(f"| {way} | " + " | ".join(mean(predicted[kind, way]) for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--blocks", type=int, nargs="+", default=None, help="default: three, early, middle and late")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration, and as many held out")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, help="keep the moments here; a later run continues from them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    stream = BlockStream(checkpoint, dtype=getattr(torch, args.dtype))
    blocks, depth = list(stream.blocks), len(stream.blocks)
    turned = {name: transposed for name, (_, transposed) in orientation(stream).items()}
    wanted = args.blocks or sorted({round(share * (depth - 1)) for share in (0.138, 0.483, 0.862)})
    gaps: Gaps = defaultdict(list)
    predicted: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        texts = dict(zip(("calibration", "held-out"), calibration_and_held_out(
            checkpoint, [args.text], tokens=args.tokens, held_out_tokens=args.tokens, length=args.length), strict=True))
        spaces = {side: Workspace(work / side, {"tokens": args.tokens}) for side in texts}
        for side, windows in texts.items():
            sweep(stream, windows, spaces[side])
        calls = stream.calls(texts["calibration"])
        for k in track(wanted, "gaps"):
            sides = {side: moments(space, calls, blocks[k]) for side, space in spaces.items()}
            block_gaps(checkpoint, blocks[k], turned, args.codecs, sides, args.tokens, gaps, predicted)
    bits = {name: codecs.bits_per_weight(codecs.get(name), (256, 2048)) for name in args.codecs}
    text = tables(gaps, predicted, args.codecs, bits)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
