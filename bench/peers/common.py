"""What every peer's script shares: arguments, calibration rows, the clock, and the one line that frontier.py reads.

The contract of bench/peers/PEER.py, run by the Python of PEER's own environment:

    PEER.py REFERENCE CALIBRATION_TEXT OUT --bits B [--group 64 --tokens 32768 --length 512]

leaves in OUT what stock Transformers opens, a folder or one .gguf, and prints as its last line one JSON document:
peer, version, seconds (wall, quantising only, no loading of libraries), cpu_seconds (of all threads, the same span),
bytes_linear (of the matrices in the blocks, coded, with scales and zero points) and file (what the referee opens).
Only the matrices in the blocks are coded; the embedding, tied to the head here, stays as it is.

A peer without a file that a stock reader opens is written as bfloat16 of the values its decoder gives; `packed` then
counts its bytes as its numbers define them, laid without a gap: codes of B bits and the scales (and zero points) of each
group at the width at which the peer keeps them. A peer never pays for its container's padding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(doc: str | None, **further: int | str) -> argparse.Namespace:
    """The command line; `further` are a peer's own options with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64 * 512)
    parser.add_argument("--length", type=int, default=512)
    for name, value in further.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def calibration(args: argparse.Namespace) -> list[list[int]]:
    """`tokens` of the text in whole windows of `length`, evenly spaced over it."""
    tokenizer = AutoTokenizer.from_pretrained(args.reference)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    total, count = len(ids) // args.length, args.tokens // args.length
    if not 0 < count <= total:
        sys.exit(f"{args.text} has {total} windows of {args.length} tokens and {count} are asked for")
    return [ids[i * args.length:(i + 1) * args.length] for i in range(total)][::max(1, total // count)][:count]


def open_model(args: argparse.Namespace, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(args.reference, dtype=dtype).eval()


def inner(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The matrices in the blocks by module name: every Linear but the head."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def packed(shapes: list[tuple[int, int]], bits: int, group: int, *, scale: int = 16, zero: int = 0) -> int:
    """Bytes of matrices (O, I) at `bits` a weight with `scale` + `zero` further bits a group of each row."""
    return sum((rows * columns * bits + rows * -(-columns // group) * (scale + zero) + 7) // 8 for rows, columns in shapes)


def stored(folder: Path, names: list[str]) -> int:
    """Bytes in the folder's safetensors of every tensor that belongs to one of the modules."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                if key.rpartition(".")[0] in names:
                    tensor = opened.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total


def write_floats(reference: Path, weights: dict[str, torch.Tensor], out: Path) -> Path:
    """The reference's folder with these tensors (module name -> decoded weight) in the place of its own, in its dtype."""
    tensors = load_file(reference / "model.safetensors")
    for name, weight_OI in weights.items():
        key = f"{name}.weight"
        assert tensors[key].shape == weight_OI.shape, key
        tensors[key] = weight_OI.detach().to(tensors[key].dtype).contiguous()
    shutil.copytree(reference, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


class Clock:
    """Wall and processor seconds since its making; the processor's with those of children that have ended."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        return {"seconds": round(time.perf_counter() - self.wall, 1), "cpu_seconds": round(sum(os.times()[:4]) - self.cpu, 1)}


def report(peer: str, spent: dict[str, float], bytes_linear: int, file: Path, **further: str | int) -> None:
    """The last line; `further` may name the version of what is no Python package."""
    document = {"peer": peer, "version": further.pop("version", None) or version(peer), **spent}
    print(json.dumps({**document, "bytes_linear": bytes_linear, "file": str(file), **further}), flush=True)
