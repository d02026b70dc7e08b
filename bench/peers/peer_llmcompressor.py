"""GPTQ by llm-compressor (vLLM project), with the package's defaults: no act order, absmax scales, dampening 0.01.

Symmetric integers at 3 and 4 bits, as its presets have them, zero points at 2. bytes_linear are those of the tensors in its
compressed-tensors folder; scored are the values that it leaves in the model, on the integers' grid, for a folder with zero
points does not open in Transformers 5.23. The contract is in common.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Clock, arguments, calibration, inner, open_model, report, stored, write_floats
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier


def main() -> None:
    args = arguments(__doc__)
    rows = calibration(args)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * args.length] * len(rows)})
    model = open_model(args)
    names = list(inner(model))
    weights = QuantizationArgs(num_bits=args.bits, type="int", symmetric=args.bits > 2, strategy="group",
                               group_size=args.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    clock = Clock()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=args.length, num_calibration_samples=len(rows))
    spent = clock.read()
    file = write_floats(args.reference, {name: model.get_submodule(name).weight for name in names}, args.out)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_compressed=True)
        report("llmcompressor", spent, stored(Path(scratch), names), file)


if __name__ == "__main__":
    main()
