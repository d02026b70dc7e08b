"""Our quality figures beside those of an external referee, on the same models, text, windows and number type.

    python bench/referee_agreement.py REFERENCE CANDIDATE TEXT --referee referee.py [--windows 16] [--length 1024]

The referee is a script with the same arguments that prints one JSON document. REFERENCE and CANDIDATE are Hugging Face
folders, CANDIDATE may be a .gguf file. With --make-candidate, CANDIDATE is written first: REFERENCE with every matrix
rounded to 8 bits a row (symmetric).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from supremum.checkpoint import open_checkpoint
from supremum.measure import evaluate
from supremum.text.windows import read_windows, spread

NAMES = {"perplexity_reference": "perplexity_reference", "perplexity_candidate": "perplexity", "kl_mean": "kl_mean",
         "kl_standard_error": "kl_se", "kl_p99": "kl_p99", "same_top_token": "same_top", "tokens": "tokens"}


def round_rows(reference: Path, candidate: Path) -> None:
    """Write `candidate`: matrices as round(w / s) s with s = max |row| / 127, stored in their own type."""
    shutil.copytree(reference, candidate)
    for path in candidate.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if weight.ndim == 2:
                scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
                tensors[name] = ((weight.float() / scale).round() * scale).to(weight.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("reference", "candidate", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--referee", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--make-candidate", action="store_true")
    args = parser.parse_args()
    if args.make_candidate:
        round_rows(args.reference, args.candidate)

    reference = open_checkpoint(args.reference)
    windows = read_windows(reference, [args.text], length=args.length, wanted=args.windows)
    windows = windows[spread(len(windows), args.windows)]
    ours = evaluate(open_checkpoint(args.candidate), reference, windows, dtype=getattr(torch, args.dtype)).to_dict()
    theirs = json.loads(subprocess.run(
        [sys.executable, args.referee, args.reference, args.candidate, args.text, "--windows", str(args.windows),
         "--length", str(args.length), "--dtype", args.dtype], check=True, stdout=subprocess.PIPE).stdout)
    print(f"{'':<22}{'ours':>14}{'referee':>14}{'difference':>14}")
    for other, name in NAMES.items():
        one, two = ours[name], theirs[other]
        print(f"{name:<22}{one:>14.7g}{two:>14.7g}{one - two:>14.2e}")


if __name__ == "__main__":
    main()
