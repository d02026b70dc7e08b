"""Peak memory of the forward sweep on a synthetic Llama with random weights, sharded on disk.

    python bench/memory.py [--hidden 2048 --layers 22 --ffn 5632 --tokens 4096]      # 1.1 B parameters by default

Writes the model (bfloat16, shards of 500 MB) shard by shard into a temporary folder, sweeps it in a fresh process and prints
the process's peak resident memory beside the model's size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

CHILD = """
import sys, time, torch
from pathlib import Path
from supremum.checkpoint import open_checkpoint
from supremum.progress import peak_rss_mb
from supremum.stats.streaming import BlockStream
from supremum.stats.sweep import sweep
from supremum.text import fast_dtype
from supremum.workspace import Workspace
folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
print("peak after imports", round(peak_rss_mb()), "MB", flush=True)
checkpoint = open_checkpoint(folder / "model")
windows = torch.randint(0, checkpoint.config.vocab_size, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
start = time.perf_counter()
sweep(BlockStream(checkpoint, dtype=fast_dtype()), windows, Workspace(folder / "work", {}))
print(f"sweep of {windows.numel()} tokens: {time.perf_counter() - start:.0f} s, peak {peak_rss_mb():.0f} MB")
"""


def write_model(folder: Path, hidden: int, layers: int, ffn: int, vocabulary: int) -> int:
    """A Llama folder without a tokenizer; returns its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=ffn, vocab_size=vocabulary,
                         num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512),
                         tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: list[tuple[str, int]] = []
    count = size = 0
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        tensor = tensor.bfloat16()
        if size > 500e6:
            save_file(shards[-1], folder / f"part-{len(shards):05d}.safetensors", metadata={"format": "pt"})
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        names.append((name, len(shards)))
        count += tensor.numel()
        size += 2 * tensor.numel()
    save_file(shards[-1], folder / f"part-{len(shards):05d}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"part-{shard:05d}.safetensors" for name, shard in names}
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = write_model(folder / "model", args.hidden, args.layers, args.ffn, args.vocabulary)
        print(f"{count / 1e9:.2f} B parameters, {2 * count / 1e6:.0f} MB on disk", flush=True)
        subprocess.run([sys.executable, "-c", CHILD, scratch, str(args.tokens)], check=True)


if __name__ == "__main__":
    main()
