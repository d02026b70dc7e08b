"""HQQ (Mobius Labs): scales and zero points by half-quadratic splitting on the weights; no calibration text is read.

Groups along the input (axis 1, the layout that its kernels take), scale and zero point of 16 bits a group, as its
`dequantize` reads them; three bits counted as three, not as the 3.2 of its words of ten. The contract is in common.py.
"""

from __future__ import annotations

from common import Clock, arguments, inner, open_model, packed, report, write_floats
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def main() -> None:
    args = arguments(__doc__)
    model = open_model(args)
    linears = inner(model)
    shapes = [tuple(m.weight.shape) for m in linears.values()]
    config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group, axis=1)
    clock = Clock()
    coded = {name: HQQLinear(m, config, compute_dtype=m.weight.dtype, device="cpu") for name, m in linears.items()}
    spent = clock.read()
    file = write_floats(args.reference, {name: m.dequantize() for name, m in coded.items()}, args.out)
    report("hqq", spent, packed(shapes, args.bits, args.group, scale=16, zero=16), file)


if __name__ == "__main__":
    main()
