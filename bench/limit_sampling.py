"""How much of the limit is an accident of the sample: the KL that it promises, and what its code would do to other text.

    python bench/limit_sampling.py MODEL TEXT TEXT_HELDOUT [--blocks 4 14 25] [--tokens 8192] [--bits 4 3] [--out FILE.md]

The limit's code at water level theta has the error k s^2, k = min(1, theta / u), in the components of the eigenbases (U, V)
of S and B. With S and B of the calibration windows it promises 1/2 sum k s^2 alpha beta; on other text with S' and B' it
would do 1/2 sum k s^2 (U^T S' U)_ii (V^T B' V)_jj (K-FAC). The true limit lies between. "shrunk": B as `supremum limit`
takes it (stats.fisher.shrunk), "raw": as gathered; S is shrunk below ten tokens a feature in both.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from founding import windows_of
from founding_codes import Statistics
from torch import Tensor

from supremum.checkpoint import open_checkpoint
from supremum.limits import Curve, LayerSpectrum, metric
from supremum.stats.fisher import fisher, fisher_file, shrunk
from supremum.stats.streaming import BlockStream


class Layer:
    """One layer's eigenbases on the calibration text, and both texts' energies in them."""

    def __init__(self, name: str, weight: Tensor, moment_II: Tensor, fisher_OO: Tensor, share: float, tokens: int,
                 others: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.name, self.tokens, self.variance = name, tokens, float(weight.float().square().mean())
        alpha_I, inputs_II = torch.linalg.eigh(metric(moment_II, tokens=tokens).moment_II)
        raw_O, outputs_OO = torch.linalg.eigh(fisher_OO.double())
        raw_O = raw_O.clamp_min(1e-12 * float(raw_O[-1]))
        self.alpha_I = alpha_I
        self.beta_O = {"raw": raw_O, "shrunk": shrunk(raw_O, share)}
        self.others = {text: ((inputs_II * (s.double() @ inputs_II)).sum(0), (outputs_OO * (b.double() @ outputs_OO)).sum(0))
                       for text, (s, b) in others.items()}

    def spectrum(self, kind: str) -> LayerSpectrum:
        beta_O = self.beta_O[kind]
        return LayerSpectrum(self.name, (len(beta_O), len(self.alpha_I)), self.variance, self.alpha_I, beta_O, self.tokens)

    def damage(self, kind: str, theta: float) -> dict[str, float]:
        """K-FAC damage of the limit's code on each text, nats a token."""
        u_OI = self.variance * self.beta_O[kind][:, None] * self.alpha_I
        error_OI = (theta / u_OI).clamp(max=1.0) * self.variance
        promised = 0.5 * float((error_OI * self.beta_O[kind][:, None] * self.alpha_I).sum())
        return {"promised": promised} | {text: 0.5 * float(b_O @ error_OI @ s_I) for text, (s_I, b_O) in self.others.items()}


def layers_of(block: str, texts: dict[str, Statistics]) -> list[Layer]:
    first = texts["calibration"]
    k = next(k for k, call in enumerate(first.calls) if call.block == block)
    moment = {text: statistics.moments(block) for text, statistics in texts.items()}
    output = {text: statistics.workspace.load(fisher_file(k)) for text, statistics in texts.items()}
    return [Layer(f"{block}.{layer}", first.stream.checkpoint.read(f"{block}.{layer}.weight"), moment["calibration"][0][key],
                  output["calibration"][f"B|{layer}"], float(output["calibration"][f"r|{layer}"]), first.windows.numel(),
                  {text: (moment[text][0][key], output[text][f"B|{layer}"]) for text in texts if text != "calibration"})
            for layer, key in moment["calibration"][1].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "held_out"):
        parser.add_argument(name)
    parser.add_argument("--blocks", type=int, nargs="+", default=None, help="default: three, early, middle and late")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, help="keep intermediate files here; a later run continues from them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    stream = BlockStream(checkpoint, dtype=getattr(torch, args.dtype))
    blocks, depth, count = list(stream.blocks), len(stream.blocks), args.tokens // args.length
    wanted = args.blocks or sorted({round(share * (depth - 1)) for share in (0.138, 0.483, 0.862)})
    calibration = windows_of(checkpoint, args.text, args.length, count)
    texts = {"calibration": calibration,
             "other windows": windows_of(checkpoint, args.text, args.length, count, skip=calibration),
             "held-out text": windows_of(checkpoint, args.held_out, args.length, count)}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        found = {text: Statistics(stream, windows, work / text.replace(" ", "-")) for text, windows in texts.items()}
        for seed, statistics in enumerate(found.values()):
            fisher(stream, statistics.windows, statistics.workspace, length=args.length, seed=seed)
        layers = [layer for k in wanted for layer in layers_of(blocks[k], found)]
    lines = ["| B | bits | promised | other windows | held-out text | bits between |", "|---" * 6 + "|"]
    for kind in ("raw", "shrunk"):
        curve = Curve([layer.spectrum(kind) for layer in layers])
        for bits in args.bits:
            theta = 2.0 ** curve.level_at_bits(bits)
            each = [layer.damage(kind, theta) for layer in layers]
            total = {text: sum(one[text] for one in each) for text in each[0]}
            cells = [f"{value:.3g}" for value in total.values()]
            promised = total.pop("promised")
            between = ", ".join(f"{0.5 * math.log2(value / promised):.2f}" for value in total.values())
            lines.append(f"| {kind} | {bits:g} | " + " | ".join(cells) + f" | {between} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
