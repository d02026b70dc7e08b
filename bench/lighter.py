"""The off-grid reference model with part of its noise: the same draw, nearer to the weights that it was added to.

    python bench/lighter.py REFERENCE OUT --noise 0.29

REFERENCE: SmolLM2-135M-Instruct with one grid step of uniform noise on its linear layers; the weights below are those of the
demo model. W = W_demo + NOISE (W_reference - W_demo), in bfloat16: whether a comparison owes anything to the noise.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from supremum.checkpoint import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--noise", type=float, default=0.29, help="share of the reference's")
    args = parser.parse_args()
    shutil.copytree(args.reference, args.out, ignore=shutil.ignore_patterns("model.safetensors"))
    original = open_checkpoint("demo")
    weights = load_file(args.reference / "model.safetensors")
    for name, noisy_OI in weights.items():
        if "_proj." in name:  # the others have no noise
            weight_OI = original.read(name).float()
            weights[name] = weight_OI.lerp(noisy_OI.float(), args.noise).to(noisy_OI.dtype)
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
