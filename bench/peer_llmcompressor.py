"""GPTQ by llm-compressor on the same model and text, in its own environment: the peer row of bench/frontier.py.

    python -m venv peer && peer/bin/pip install "torch>=2.6,<2.14" && peer/bin/pip install llmcompressor
    peer/bin/python bench/peer_llmcompressor.py REFERENCE CALIBRATION_TEXT OUT --bits 4 [--group 64 --tokens 24576]

Symmetric integers, llm-compressor's defaults (MSE observer off, act order off unless its own default says so). Prints the
wall seconds of the run without the loading of libraries.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.reference)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    total = len(ids) // args.length
    count = args.tokens // args.length
    rows = [ids[i * args.length:(i + 1) * args.length] for i in range(total)][::max(1, total // count)][:count]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * args.length] * len(rows)})
    model = AutoModelForCausalLM.from_pretrained(args.reference, dtype="auto")
    weights = QuantizationArgs(num_bits=args.bits, type="int", symmetric=True, strategy="group", group_size=args.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    start = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=args.length, num_calibration_samples=len(rows))
    print(f"seconds {time.perf_counter() - start:.0f}", flush=True)
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
