"""AutoRound (Intel): rounding and clipping of each block by signed gradient descent on the block's output error.

200 iterations on 64 windows of 512 tokens, two of them a step; the learning rate 1/200 and all else are the package's
defaults, which have 128 windows of 2048 and eight of them a step: sixteen times the tokens a step. Symmetric integers
at 3 and 4 bits, zero points at 2. The contract is in common.py.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from common import Clock, arguments, calibration, inner, open_model, packed, report, write_floats
from transformers import AutoTokenizer


def main() -> None:
    args = arguments(__doc__, batch=2, iterations=200)
    rows = [torch.tensor([row]) for row in calibration(args)]
    model = open_model(args)
    shapes = [tuple(m.weight.shape) for m in inner(model).values()]
    symmetric = args.bits > 2
    clock = Clock()
    rounding = AutoRound(model, AutoTokenizer.from_pretrained(args.reference), bits=args.bits, group_size=args.group,
                         sym=symmetric, iters=args.iterations, nsamples=len(rows), seqlen=args.length, batch_size=args.batch,
                         dataset=rows, device_map="cpu")
    model, _ = rounding.quantize()  # the weights are now the decoded ones
    spent = clock.read()
    weights = {name: m.weight for name, m in inner(model).items()}
    assert len(weights) == len(shapes)
    file = write_floats(args.reference, weights, args.out)
    report("auto-round", spent, packed(shapes, args.bits, args.group, zero=0 if symmetric else args.bits), file)


if __name__ == "__main__":
    main()
