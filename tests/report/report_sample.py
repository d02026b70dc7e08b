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
        "limits": {"information": {"bits_at_kl_0.05": _value(3.02, "bits/weight", "bound", "Gaussian weights, K-FAC"),
                                   "entropy_of_stored_weights": _value(10.9, "bits/weight", "measured")},
                   "hardware": {"read_bandwidth": {"L2, 1 thread": _value(177, "GB/s", "measured"),
                                                   "L3, 2 threads": _value(56.4, "GB/s", "measured"),
                                                   "memory, 2 threads": _value(33.7, "GB/s", "measured")},
                                "decode": {"this file, 2 threads": _value(412, "tokens/s", "bound", "from bandwidth"),
                                           "bfloat16, 2 threads": _value(125, "tokens/s", "bound")}}},
        "budget": {"size": 84_000_000, "bits": None, "max_kl": None},
        "plan": plan, "frontier": _frontier(bits, size),
        "result": {"target": "gguf", "file": "model.gguf", "bytes": size, "budget_bytes": 84_000_000,
                   "bits_per_weight": bits, "predicted_kl": 0.0611, "limit_kl": 0.0119, "limit_bits": bits - 1.23,
                   "gap_bits": 1.23,
                   "measured": {"perplexity": 24.61, "perplexity_se": 0.42, "perplexity_reference": 23.39,
                                "kl_mean": 0.0654, "kl_se": 0.0019, "kl_median": 0.0312, "kl_p99": 0.512,
                                "same_top": 0.871, "tokens": 16384, "windows": 16}},
        "proof": {"runtime": "llama.cpp (xllamacpp)", "version": "2026.10.11549", "passed": True,
                  "agreement": {"max_abs_logit_difference": 0.021, "kl_nats": 2.1e-6, "same_top": 0.998, "tokens": 512},
                  "speeds": {"prefill_tokens_per_s": 145.2, "decode_tokens_per_s": 48.1, "load_s": 0.41}},
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
    points.append({"bits": 4.5, "bytes": 77_800_000, "kl": 0.291, "kind": "baseline", "label": "Q4_0, nearest"})
    return points


def _value(value: float, unit: str, kind: str, note: str = "") -> dict[str, Any]:
    return {"value": value, "unit": unit, "kind": kind, "note": note}
