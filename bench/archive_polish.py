"""Whether an archive's integers can be polished: each row's path sought again, all other rows as they are.

    python bench/archive_polish.py MODEL TEXT [--blocks 14] [--tokens 8192] [--bits 3] [--rounds 1]

solve/water.py decides one row after the other; a row cancels the errors of those before it, and those behind it have yet to
cancel its own. Afterwards all errors are known. With e_p the error of row p, the damage that row o can still change is

    B_oo / 2 |(w'_o - w_hat_o)|_S^2 + theta ln 2 bits,   w'_o = w_o + sum_{p != o} B_op e_p / B_oo

so its path is sought once more for w'_o, at a rate that counts less as B_oo is larger than what cancellation left of it. A
new path is kept where this sum falls. Printed for each layer: bits a weight by the normal's cost, the damage tr(B dW S dW^T)
in the damped metrics over that before, the layer's own gap before and after, rows that took a new path, CPU seconds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supremum.checkpoint import open_checkpoint
from supremum.codecs.lattice import CLASSES, Lattice
from supremum.codecs.rans import LARGEST
from supremum.codecs.trellis import DISTORTION, symbols
from supremum.gather import damage, gather, gather_fisher
from supremum.limits import Curve, spectrum
from supremum.limits import metric as analysed
from supremum.solve.cancellation import DAMPING, OUTPUT_DAMPING, Metric
from supremum.solve.viterbi import normal_bits, search
from supremum.solve.water import RATE, Outputs, Spread, trusted, water
from supremum.stats.sweep import moments, tokens
from supremum.workspace import Workspace


def row_bits(lattice: Lattice, integers_I: NDArray[np.int16], row: int) -> float:
    """Of one row, by the normal's cost."""
    _, quantiser_1I, _ = symbols(integers_I[None])
    size_I = (np.abs(integers_I.astype(np.int64)) + quantiser_1I[0]) >> 1
    class_I = int(lattice.frame.row_class_O[row]) + lattice.frame.column_class_I.numpy().astype(np.int64)
    return float(normal_bits()[class_I.clip(0, CLASSES - 1), quantiser_1I[0], size_I.clip(max=LARGEST)].sum())


def polished(lattice: Lattice, target_OI: Tensor, metric: Metric, fisher_OO: Tensor, theta: float, rounds: int,
             ) -> tuple[Lattice, int]:
    """Rows with the largest Fisher first. fisher_OO: as damped as the solver's. Returns how many paths are new."""
    frame = lattice.frame
    row_O, column_I = frame.scales()
    integers_OI = lattice.integers_OI.clone()
    error_OI = target_OI - lattice.decode()
    upper_II = metric.factor_II.numpy()
    lower_II = np.ascontiguousarray(upper_II.T)
    taken = 0
    for _ in range(rounds):
        for o in fisher_OO.diagonal().argsort(descending=True).tolist():
            own = float(fisher_OO[o, o])
            others_I = fisher_OO[o] @ error_OI - own * error_OI[o]
            wish_1I, part = (target_OI[o] + others_I / own)[None], slice(o, o + 1)
            unit = theta / DISTORTION  # nats, times two, of an error of one step
            found_1I, left_1I = np.empty(wish_1I.shape, np.int16), np.empty(wish_1I.shape, np.float32)
            search(wish_1I.numpy(), np.zeros((0, 0), np.float32), upper_II, lower_II, row_O[part].numpy(), column_I.numpy(),
                   frame.row_class_O[part].numpy(), frame.column_class_I.numpy(),
                   RATE * unit / (own * float(row_O[o]) ** 2), found_1I, left_1I)
            new_I = target_OI[o] - torch.from_numpy(found_1I[0]).float() * row_O[o] * column_I
            costs = []
            for error_I, numbers_I in ((error_OI[o], integers_OI[o].numpy()), (new_I, found_1I[0])):
                image_I = metric.moment_II @ error_I
                costs.append(own * float(error_I @ image_I) + 2 * float(others_I @ image_I)
                             + unit * RATE * row_bits(lattice, numbers_I, o))
            if costs[1] < costs[0]:
                error_OI[o], integers_OI[o] = new_I, torch.from_numpy(found_1I[0])
                taken += 1
    return Lattice(integers_OI, frame), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--blocks", type=int, nargs="+", default=[14])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=float, default=3.0, help="about, of each layer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="of the forward passes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        gathered = gather(open_checkpoint(args.model), Workspace(Path(folder) / "work", {}), text=[args.text],
                          tokens=args.tokens, seed=0, dtype=args.dtype)
        gather_fisher(gathered, 0)
        print("| layer | bits | after | damage | gap | after | new paths | solve, s | polish, s |\n" + "|---" * 9 + "|")
        for number, block in enumerate(gathered.stream.blocks):
            if number not in args.blocks:
                continue
            sums, keys = moments(gathered.workspace, gathered.calls, block)
            seen = tokens(gathered.workspace, gathered.calls, block)
            for layer, key in keys.items():
                weight_OI, fisher = gathered.weight(gathered.inner(block, layer)), gathered.fisher(block, layer)
                if fisher.ndim == 1:
                    continue  # rows apart: nothing to make up for
                metric = Metric.of(sums[key].float(), damping=DAMPING, act_order=False)
                curve = Curve([spectrum(layer, weight_OI, analysed(sums[key], tokens=seen[key]), fisher)])
                theta, began = 2.0 ** curve.level_at_bits(args.bits - 0.25), time.process_time()
                before = water(weight_OI, metric, Outputs.of(fisher, OUTPUT_DAMPING), theta, Spread.of(weight_OI)).lattice
                solved = time.process_time()
                fisher_OO = trusted(fisher, OUTPUT_DAMPING)
                after, taken = polished(before, weight_OI, metric, fisher_OO, theta, args.rounds)
                polish = time.process_time() - solved
                bits, nats, gaps = [], [], []
                for lattice in (before, after):
                    rows = lattice.integers_OI.numpy()
                    bits.append(math.fsum(row_bits(lattice, rows[o], o) for o in range(len(rows))) / rows.size)
                    change_OI = lattice.decode() - weight_OI
                    nats.append(damage(fisher_OO, change_OI, change_OI @ metric.moment_II))
                    gaps.append(bits[-1] - curve.bits_at_kl(damage(fisher, change_OI, change_OI @ sums[key])))
                print(f"| {number}.{layer} | {bits[0]:.4f} | {bits[1]:.4f} | {nats[1] / nats[0]:.4f} | {gaps[0]:.4f} | "
                      f"{gaps[1]:.4f} | {taken} of {len(weight_OI)} | {solved - began:.1f} | {polish:.1f} |", flush=True)


if __name__ == "__main__":
    main()
