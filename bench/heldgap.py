"""Whether an archive's gap to the limit is that of the text it was calibrated on, or holds on other windows of it.

    python bench/heldgap.py REFERENCE TEXT [--bits 3] [--tokens 8192] [--untrained] [--quick] [--dtype auto] [--json]

The archive is made as `supremum optimize --target archive --bits` makes it, from TOKENS calibration tokens. `supremum limit`
takes S, B and so the limit from the calibration windows and the KL from others. Here each side has both from its own
windows, as many of each: the calibration's, and others that share no text with them and had no part in the archive. (KL on
KL_TOKENS of each, spread evenly.) Two more rows have S of one side and B of the other.

    gap              b - R(k): bits above the least at the measured KL                 (gap.py)
    layers' gap      mean_l (b_l - R_l(n_l)): the same of each layer by itself, in the metric of that side's S and B

--untrained: without the last stage, which trains norms on the calibration windows. --quick: the code for just this metric,
each matrix solved once for the original's inputs, every token alike, nothing trained; without it the drift is corrected and
tokens are weighed, which lowers the KL and not the layers' gap. --json: the table goes to standard error and a JSON document
to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from supremum.allocate import Budget
from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.gap import FileGap, _damage, _least, gap_of
from supremum.gather import HELD_OUT_TOKENS, Gathered, gather, gather_fisher, window_length
from supremum.job import lay_out, open_job
from supremum.limits import Curve
from supremum.pipeline import made, statistics
from supremum.plain import plain
from supremum.solve import gains
from supremum.text.windows import calibration_and_held_out, spread
from supremum.workspace import Workspace

KL_TOKENS = 32768


@dataclass(frozen=True)
class Side:
    """One set of windows. Bits a weight; nats a token."""

    windows: str
    bits: float
    kl: float
    kl_se: float
    least_bits: float
    gap: float
    layers_gap: float

    @classmethod
    def of(cls, windows: str, found: FileGap) -> Side:
        weights = sum(layer.weights for layer in found.layers)
        return cls(windows, found.bits, found.kl, found.kl_se, found.least_bits, found.gap,
                   sum(layer.gap * layer.weights for layer in found.layers) / weights)

    def line(self) -> str:
        return (f"| {self.windows} | {self.bits:.3f} | {self.kl:.4f} ± {self.kl_se:.4f} | {self.least_bits:.3f} | "
                f"{self.gap:.3f} | {self.layers_gap:.3f} |")


def own(gathered: Gathered, file: Checkpoint) -> FileGap:
    """The file against the limit of the gathered windows, KL on these too."""
    windows_NT = gathered.windows
    few = spread(len(windows_NT), min(len(windows_NT), KL_TOKENS // windows_NT.shape[1]))
    return gap_of(replace(gathered, held_out=windows_NT[few]), file)


@dataclass
class Mixed(Gathered):
    """S of one set of windows, B of another."""

    other: Gathered | None = None

    def fisher(self, block: str, layer: str) -> Tensor:
        assert self.other is not None
        return self.other.fisher(block, layer)

    def layers_gap(self, file: Checkpoint) -> float:
        spectra = list(self.spectra())
        nats, _ = _damage(self, file, spectra)
        own = [8 * file.tensors[layer.name].nbytes / layer.weights - _least(Curve([layer]), nats[layer.name])
               for layer in spectra]
        return sum(gap * layer.weights for gap, layer in zip(own, spectra, strict=True)) / sum(one.weights for one in spectra)


def workspace_of(folder: Path, calibration_NT: Tensor, held_out_NT: Tensor) -> Workspace:
    """A workspace whose windows are drawn already."""
    workspace = Workspace(folder, {})
    workspace.save("windows.safetensors", {"calibration": calibration_NT.clone(), "held_out": held_out_NT.clone()})
    return workspace


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("text")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration, and as many held out")
    parser.add_argument("--untrained", action="store_true", help="norms stay as they are")
    parser.add_argument("--quick", action="store_true", help="neither drift nor token weights nor training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the forward passes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    checkpoint = open_checkpoint(args.reference)
    length = window_length(checkpoint)
    windows_NT, rest_NT = calibration_and_held_out(checkpoint, [args.text], tokens=args.tokens, length=length, seed=args.seed,
                                                   held_out_tokens=args.tokens + HELD_OUT_TOKENS)
    others_NT, chooses_NT = rest_NT[:len(windows_NT)], rest_NT[len(windows_NT):]  # the last choose among the states of gains
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = open_job(args.reference, folder / "out", target="archive", text=[args.text], tokens=args.tokens, keep=None,
                       only=None, seed=args.seed, dtype=args.dtype, quick=args.quick)
        found = statistics(job, lay_out(job), workspace_of(folder / "calibration", windows_NT, chooses_NT))
        passes, gains.PASSES = gains.PASSES, 0 if args.untrained else gains.PASSES
        try:
            _, written = made(found, Budget(bits=args.bits))
        finally:
            gains.PASSES = passes
        file = open_checkpoint(written)
        say("| windows | bits | KL | of the limit | gap | layers' gap |\n|---|---|---|---|---|---|")
        sides = [Side.of("calibration", own(found.gathered, file))]
        say(sides[0].line())
        held_out = gather(checkpoint, workspace_of(folder / "held-out", others_NT, others_NT), text=[args.text],
                          tokens=args.tokens, seed=args.seed, dtype=args.dtype)
        gather_fisher(held_out, args.seed)
        sides.append(Side.of("held-out", own(held_out, file)))
        say(sides[1].line())
        mixed = {f"{name}, B of the other": Mixed(**vars(one), other=other).layers_gap(file) for name, one, other in
                 (("S of calibration", found.gathered, held_out), ("S of held-out", held_out, found.gathered))}
        for name, value in mixed.items():
            say(f"| {name} | | | | | {value:.3f} |")
    gap, layers = (getattr(sides[1], name) - getattr(sides[0], name) for name in ("gap", "layers_gap"))
    say(f"| difference | | | | {gap:+.3f} | {layers:+.3f} |")
    if args.json:
        print(json.dumps(plain({"reference": args.reference, "text": args.text, "tokens": windows_NT.numel(),
                                "bits": args.bits, "trained": not (args.untrained or args.quick), "quick": args.quick,
                                "seed": args.seed,
                                "sides": sides, "mixed_layers_gap": mixed,
                                "gap_difference": gap, "layers_gap_difference": layers}), indent=1))


if __name__ == "__main__":
    main()
