"""optimum-quanto (Hugging Face): nearest rounding between the least and the largest weight; no calibration text is read.

2, 4 and 8 bits only. The package has no option for the group: 128 of its own, 96 where 128 does not divide the rows, so
--group is not used. Scale and shift are kept in the weights' 16 bits. The contract is in common.py.
"""

from __future__ import annotations

import sys

from common import Clock, arguments, inner, open_model, packed, report, write_floats
from optimum.quanto import freeze, qint2, qint4, qint8, quantize


def main() -> None:
    args = arguments(__doc__)
    kinds = {2: qint2, 4: qint4, 8: qint8}
    if args.bits not in kinds:
        sys.exit(f"optimum-quanto has no integers of {args.bits} bits, only of {sorted(kinds)}")
    model = open_model(args)
    names = list(inner(model))
    clock = Clock()
    quantize(model, weights=kinds[args.bits], include=names)
    freeze(model)
    spent = clock.read()
    coded = {name: model.get_submodule(name) for name in names}
    size = sum(packed([tuple(m.weight.shape)], args.bits, m.weight_group_size or m.in_features, scale=16,
                      zero=16 if args.bits < 8 else 0) for m in coded.values())
    file = write_floats(args.reference, {name: m.weight.dequantize() for name, m in coded.items()}, args.out)
    report("optimum-quanto", spent, size, file)


if __name__ == "__main__":
    main()
