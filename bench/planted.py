"""Whether the scaling fit's 95 % intervals hold where the law is known: ladders drawn from a planted law, a larger run each.

    python bench/planted.py [--ladders 40] [--lengths 4] [--draws 100] [--noise 0.01]

A ladder: 4 sizes from 1e6 to 1e8 parameters times `--lengths` numbers of tokens from 2e7 to 2e9, the loss with lognormal
noise. The run to come is six times larger than the largest and twice as long as the longest.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from supremum.limits.forecast import check
from supremum.limits.law import Law
from supremum.limits.runs import Run
from supremum.limits.scaling import fit_runs

TRUE = Law(1.8, 400.0, 600.0, 0.34, 0.30, repeats=math.inf, excess=math.inf, gamma=2.6745, shift=0.3037)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=40)
    parser.add_argument("--lengths", type=int, default=4)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.01)
    args = parser.parse_args()
    sizes, lengths = np.geomspace(1e6, 1e8, 4), np.geomspace(2e7, 2e9, args.lengths)
    larger, longer = 6 * sizes[-1], 2 * lengths[-1]
    exponents = inside = doubted = 0
    errors = []
    for seed in range(args.ladders):
        rng = np.random.default_rng(seed)
        noisy = [Run(n, d, float(TRUE.loss(n, d)) * math.exp(args.noise * rng.standard_normal()), d)
                 for n in sizes for d in lengths]
        fit = fit_runs(noisy, draws=args.draws)
        low, high = fit.intervals["alpha"]
        exponents += low <= TRUE.alpha <= high
        doubted += not fit.identified
        to_come = float(TRUE.loss(larger, longer)) * math.exp(args.noise * rng.standard_normal())
        (row,) = check(fit, [Run(larger, longer, to_come, longer)])
        inside += bool(row.inside)
        errors.append(row.error or 0.0)
    print(f"{args.ladders} ladders of {len(sizes) * len(lengths)} runs, {args.draws} draws, noise {100 * args.noise:g} %: "
          f"alpha in its interval in {exponents}, the run to come in its own in {inside}, error "
          f"{100 * math.sqrt(np.mean(np.square(errors))):.2f} % (root mean square), exponents not identified in {doubted}")


if __name__ == "__main__":
    main()
