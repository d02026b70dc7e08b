"""GPTQ by GPTQModel (ModelCloud), with the package's defaults: group-aware act order, absmax scales, dampening of its own.

Symmetric integers at 3 and 4 bits, zero points at 2, where symmetric levels are too few. Its folder (GPTQ v1) opens in
Transformers only beside the package, so what is scored are the values that its own decoder gives. The contract is in
common.py.
"""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails where there are two cores or fewer

from common import Clock, arguments, calibration, packed, report, write_floats
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear


def main() -> None:
    args = arguments(__doc__)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration(args)]
    symmetric = args.bits > 2
    config = QuantizeConfig(bits=args.bits, group_size=args.group, sym=symmetric, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        model = GPTQModel.load(str(args.reference), config)
        clock = Clock()
        model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
        spent = clock.read()
        model.save(scratch)
        reader = GPTQModel.load(scratch, backend=BACKEND.TORCH, device="cpu")
        linears = {n: m for n, m in reader.model.named_modules() if isinstance(m, TorchLinear)}
        shapes = [(m.out_features, m.in_features) for m in linears.values()]
        file = write_floats(args.reference, {n: m.dequantize_weight().T for n, m in linears.items()}, args.out)
    report("gptqmodel", spent, packed(shapes, args.bits, args.group, zero=0 if symmetric else args.bits), file)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # its worker threads have kept a finished process from ending
