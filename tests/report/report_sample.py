"""A document as a run on SmolLM2-135M gives it: real shapes, plausible figures, nothing random."""

from __future__ import annotations

import math
from typing import Any

SHAPES = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
          "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
          "mlp.down_proj": (576, 1536)}
BITS = {"Q3_K": 3.4375, "IQ4_NL": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}


def build() -> dict[str, Any]:
    """The document; callers may change it."""
    plan = [_layer(block, name, shape) for block in range(30) for name, shape in SHAPES.items()]
    plan.append({"name": "model.embed_tokens.weight", "shape": [49152, 576], "codec": "Q4_1", "bits_per_weight": 5.0,
                 "bytes": 49152 * 576 * 5 // 8, "predicted_nats": 0.004, "share": 0.0, "limit_bits": 3.1,
                 "gap_bits": 1.9, "reason": "the next larger format would cost 3.5 MB for 0.002 nats"})
    total = sum(layer["predicted_nats"] for layer in plan)
    for layer in plan:
        layer["share"] = layer["predicted_nats"] / total
    linear = [layer for layer in plan if "embed" not in layer["name"]]
    weights = sum(math.prod(layer["shape"]) for layer in linear)
    bits = 8 * sum(layer["bytes"] for layer in linear) / weights
    size = sum(layer["bytes"] for layer in plan) + 1_940_000
    return {
        "schema": "supremum/1", "supremum_version": "0.1.0",
        "command": "supremum optimize models/smollm2 --size 84MB --text notes.txt --target gguf --out demo --seed 0",
        "inputs": {"name": "SmolLM2-135M-Instruct", "model": "models/smollm2", "format": "safetensors",
                   "architecture": "LlamaForCausalLM", "fingerprint": "8f14e45fceea167a5a36dedd4bea2543" * 2,
                   "bytes": 269_060_552, "parameters": 134_515_008,
                   "text_fingerprint": "c4ca4238a0b923820dcc509a6f75849b", "seed": 0,
                   "options": {"tokens": 65536, "dtype": "bfloat16", "keep": []}},
        "text": {"calibration": "notes.txt", "calibration_tokens": 65536, "held_out": "notes.txt, other windows",
                 "held_out_tokens": 16384},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "gguf": "0.19.0"},
        "machine": {"cpu": "AMD EPYC, 2 cores", "cores": 2, "ram_bytes": 25_300_000_000, "os": "Linux-6.18-x86_64"},
        "limits": _limits(),
        "budget": {"size": 84_000_000, "bits": None, "max_kl": None},
        "plan": plan, "frontier": _frontier(bits, size),
        "result": {"target": "gguf", "file": "model.gguf", "bytes": size, "budget_bytes": 84_000_000,
                   "bits_per_weight": bits, "predicted_kl": 0.0611, "limit_kl": 0.0119, "limit_bits": bits - 1.23,
                   "gap_bits": 1.23,
                   "measured": {"perplexity": 24.61, "perplexity_se": 0.42, "perplexity_reference": 23.39,
                                "kl_mean": 0.0654, "kl_se": 0.0019, "kl_median": 0.0312, "kl_p99": 0.512,
                                "same_top": 0.871, "tokens": 16384, "windows": 16}},
        "proof": {"runtime": "llama_cpp", "version": "xllamacpp 2026.10.11549", "passed": True,
                  "positions": 12, "top": 2048, "kl_mean": 0.0031, "kl_max": 0.011, "relative_error": 0.083,
                  "largest_difference": 0.41, "same_top": 1.0, "same_tokens": True, "load_seconds": 0.41,
                  "prefill_tokens_per_second": 145.2, "decode_tokens_per_second": 48.1, "memory": 187_000_000,
                  "threads": 2, "seconds": 11.9},
        "phases": [{"name": name, "seconds": seconds, "peak_rss_mb": rss} for name, seconds, rss in (
            ("open", 1.2, 310.0), ("write calibration text", 31.0, 900.0), ("sweep", 121.5, 1240.0),
            ("limits", 9.8, 1240.0), ("allocate", 3.1, 1240.0), ("solve", 88.4, 1310.0),
            ("measure frontier", 64.0, 1500.0), ("write", 2.2, 700.0), ("prove", 11.9, None))],
        "samples": [
            {"prompt": "What is the capital of France, and what is it known for?",
             "original": "The capital of France is Paris. It is known for its art, fashion, gastronomy and culture.",
             "compressed": "The capital of France is Paris. It is known for the Eiffel Tower, the Louvre and food."},
            {"prompt": "Write a Python function that returns the n-th Fibonacci number.",
             "original": "def fib(n):\n    if n < 2:\n        return n\n    return fib(n-1) + fib(n-2)",
             "compressed": "def fib(n):\n    if n < 2:\n        return n\n    return fib(n-1) + fib(n-2)"}],
        "assumptions": ["Gaussian weights, K-FAC Fisher, second order: holds below about 0.2 nats.",
                        "65,536 calibration tokens; the second moment of down_proj (1536 inputs) is not shrunk."],
    }


def _layer(block: int, name: str, shape: tuple[int, int]) -> dict[str, Any]:
    wanted = 4 + (block < 2) + (block > 27) + (name.endswith(("v_proj", "down_proj"))) - (name.endswith("q_proj"))
    names = ["Q3_K", "IQ4_NL", "Q4_1", "Q5_0", "Q6_K", "Q8_0"]
    codec = names[max(0, min(wanted - 3, 5)) if shape[1] % 256 == 0 else max(1, min(wanted - 3, 3))]
    weights = shape[0] * shape[1]
    damage = 2e-4 * (1 + math.cos(block / 5)) * 2 ** (4.5 - BITS[codec]) * weights / 331776
    return {"name": f"model.layers.{block}.{name}.weight", "shape": list(shape), "codec": codec,
            "bits_per_weight": BITS[codec], "bytes": int(weights * BITS[codec] / 8), "predicted_nats": damage,
            "share": 0.0, "limit_bits": BITS[codec] - 1.1 + 0.2 * math.sin(block),
            "gap_bits": 1.1 - 0.2 * math.sin(block), "reason": "best nats saved a byte at this budget"}


def _frontier(bits: float, size: int) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    for step in range(21):
        rate = 1 + step * 0.3
        points.append({"bits": rate, "bytes": int(13.3e6 * rate + 18e6), "kl": 4.0 * 4 ** (-rate), "kind": "limit",
                       "label": "no code of these weights is below"})
    for rate in (2.6, 3.1, 3.6, 4.1, 4.6, 5.1, 5.6):
        points.append({"bits": rate, "bytes": int(13.3e6 * rate + 18e6), "kl": 4.0 * 4 ** (-rate + 1.2),
                       "kind": "predicted", "label": "plan"})
    for rate in (3.1, 4.1, 5.1):
        points.append({"bits": rate, "bytes": int(13.3e6 * rate + 18e6), "kl": 4.3 * 4 ** (-rate + 1.22),
                       "kind": "measured", "label": "plan, measured"})
    points.append({"bits": bits, "bytes": size, "kl": 0.0654, "kind": "measured", "label": "this file"})
    return points


def _limits() -> dict[str, Any]:
    """In the shape of `Limits.to_dict()`, with fewer rows."""
    formats = (("F32", 32.0), ("BF16", 16.0), ("Q8_0", 8.5), ("Q4_0", 4.5), ("Q2_K", 2.625))
    rates = {"decode": 1.9e3, "prefill": 2.4e4}
    return {
        "source": "models/smollm2", "format": "safetensors", "weights": 134_515_008, "stored_bytes": 269_060_552,
        "information": {"weights": 106_168_320, "bits_at_kl": {"0.01": _value(4.1, "bits/weight", "bound"),
                                                               "0.05": _value(3.02, "bits/weight", "bound")},
                        "kl_at_bits": {"3": _value(0.052, "nats/token", "bound")}, "curve": [[1.0, 0.9], [3.0, 0.052]],
                        "high_rate": None, "layers": [], "stored": _value(16.0, "bits/weight", "measured"),
                        "lossless": _value(10.9, "bits/weight", "measured", "adaptive code, its tables included"),
                        "gap_of_file": {"KL 0.05": _value(12.98, "bits/weight", "bound")}, "formats": [],
                        "assumptions": ["weights Gaussian with one variance a layer"]},
        "hardware": {
            "machine": {"device": "cpu", "name": "AMD EPYC", "cores": 2, "memory_bytes": 25_300_000_000, "caches": [],
                        "reads": [{"where": where, "working_set": size, "threads": n, "gb_s": rate * n,
                                   "best_gb_s": 1.1 * rate * n} for where, size, rate in
                                  (("L2", 524_288, 160.0), ("L3", 16_777_216, 28.5), ("memory", 536_870_912, 17.0))
                                  for n in (1, 2)],
                        "peaks": [{"dtype": dtype, "threads": n, "gflop_s": rate * n, "best_gflop_s": 1.05 * rate * n}
                                  for dtype, rate in (("float32", 180.0), ("bfloat16", 1300.0)) for n in (1, 2)]},
            "ceilings": [{"phase": phase, "format": name, "bits": bits, "context": context, "batch": batch,
                          "tokens_per_s": rate * batch / bits, "limited_by": "memory" if batch == 1 else "arithmetic",
                          "lives_in": "L3" if bits < 6 else "memory"}
                         for phase, rate in rates.items() for name, bits in formats for context in (128, 2048)
                         for batch in (1, 8)],
            "capacities": [{"format": name, "context": 2048, "batch": 1, "weight_bytes": 134_515_008 * bits / 8,
                            "kv_bytes": 47_185_920.0, "activation_bytes": 26_000_000.0, "fits": True,
                            "longest_context": 8192} for name, bits in formats],
            "assumptions": ["every weight is read once a step"]}}


def _value(value: float, unit: str, kind: str, note: str = "") -> dict[str, Any]:
    return {"value": value, "unit": unit, "kind": kind, "note": note}
