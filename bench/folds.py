"""What two stages of others would buy after error feedback: rotations folded into the weights, and a low-rank residual.

    python bench/folds.py MODEL TEXT [--codec int3-g64 --blocks 4 14 25 --tokens 16384 --rank 8]

A Llama-like model computes the same with an orthogonal matrix R between the parts of its residual stream (QuaRot, arXiv
2404.00456) and one H in each head between v_proj and o_proj; the gains of the norms go into the matrices that read them:

    q, k, v, gate, up    W diag(gain) R^T, inputs R n           o    R W H^T           down    R W           v also H W

R and H are random; the format, with searched scales and error feedback, is fitted before and after. Low rank (QERA, arXiv
2410.06040): of dW L, S = L L^T, the best r components in closed form, stored in 16 bits. All figures in bits a weight, on
other windows of the text than the code was fitted to: gained is log2(error before / error after) / 2, spent is its storage.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.codecs import Codec
from supremum.progress import track
from supremum.solve import Metric, distortion, solve_together
from supremum.solve.cancellation import DAMPING, damped
from supremum.stats.streaming import BlockStream
from supremum.stats.sweep import moments, sweep
from supremum.text.windows import calibration_and_held_out
from supremum.workspace import Workspace

NORMS = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
         "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}


def orthogonal(size: int, seed: int) -> Tensor:
    """(size, size), uniform."""
    factor, triangle = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())
    return (factor * triangle.diagonal().sign()).float()


def coded(weight_OI: Tensor, metric_II: Tensor, codec: Codec) -> Tensor:
    """dW (O, I) of the format with error feedback. metric_II: S, damped."""
    return solve_together({"": weight_OI}, Metric.of(metric_II, damping=0), codec)[""].decode() - weight_OI


def turned(kind: str, weight_OI: Tensor, gain_I: Tensor | None, stream_dd: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """(the folded weight, T with its inputs T x)."""
    into_II = torch.eye(weight_OI.shape[1])
    if gain_I is not None:
        into_II = stream_dd / gain_I
        weight_OI = weight_OI * gain_I @ stream_dd.T
    if kind == "o_proj":
        into_II = torch.block_diag(*[heads] * (weight_OI.shape[1] // len(heads)))
        weight_OI = weight_OI @ into_II.T
    if kind in ("o_proj", "down_proj"):
        weight_OI = stream_dd @ weight_OI
    if kind == "v_proj":
        weight_OI = torch.block_diag(*[heads] * (len(weight_OI) // len(heads))) @ weight_OI
    return weight_OI.contiguous(), into_II


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--codec", default="int3-g64")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 14, 25])
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration, and as many held out")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()

    checkpoint, codec = open_checkpoint(args.model), codecs.get(args.codec)
    stream = BlockStream(checkpoint, dtype=torch.float32)
    config = stream.model.config
    stream_dd = orthogonal(config.hidden_size, 0)
    heads = orthogonal(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads, 1)
    gained: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        texts = calibration_and_held_out(checkpoint, [args.text], tokens=args.tokens, held_out_tokens=args.tokens, length=512)
        spaces = [Workspace(Path(folder) / str(i), {}) for i in range(len(texts))]
        for windows, space in zip(texts, spaces, strict=True):
            sweep(stream, windows, space)
        calls = stream.calls(texts[0])
        for block in track([f"{stream.list_name}.{k}" for k in args.blocks], "fold"):
            (fitted, keys), (unseen, _) = (moments(space, calls, block) for space in spaces)
            for layer, key in keys.items():
                kind = layer.rsplit(".", 1)[-1]
                weight_OI = checkpoint.read(f"{block}.{layer}.weight").float()
                gain_I = checkpoint.read(f"{block}.{NORMS[kind]}.weight").float() if kind in NORMS else None
                metric_II = damped(fitted[key], DAMPING)  # before it is turned: the same for both
                change_OI = coded(weight_OI, metric_II, codec)
                before = distortion(change_OI, unseen[key])
                folded_OI, into_II = turned(kind, weight_OI, gain_I, stream_dd, heads)
                after = distortion(coded(folded_OI, into_II @ metric_II @ into_II.T, codec),
                                   into_II @ unseen[key] @ into_II.T)
                factor_II = torch.linalg.cholesky(metric_II)
                left, sizes, right = torch.linalg.svd(change_OI @ factor_II, full_matrices=False)
                low_OI = torch.linalg.solve_triangular(factor_II, (left * sizes)[:, :args.rank] @ right[:args.rank],
                                                       upper=False, left=False)
                mended = distortion(change_OI - low_OI, unseen[key])
                spent = 16 * args.rank * sum(weight_OI.shape) / weight_OI.numel()
                gained[kind].append((math.log2(before / after) / 2, math.log2(before / mended) / 2, spent))
    print(f"| layer | a rotation gains | rank {args.rank} gains | and spends |\n|---|---|---|---|")
    for kind, found in [*gained.items(), ("all", [row for rows in gained.values() for row in rows])]:
        print(f"| {kind} | " + " | ".join(f"{sum(column) / len(found):.3f}" for column in zip(*found, strict=True)) + " |")


if __name__ == "__main__":
    main()
