"""What a quantised cache of keys and values costs, measured in llama.cpp: keys and values each by its type.

At the same prefixes of held-out windows, p with the cache of 16-bit floats that llama.cpp has by default and q with the
quantised one, both of the same file, each in a fresh process and over the whole vocabulary:

    KL = sum p (ln p - ln q)                               nats a position; standard errors over windows
    bytes = context * sum over layers h_kv d_h (bytes of a key's number + bytes of a value's)

Windowed attention needs less than that. Every prefix but the first is continued from the cache, as in generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.gguf_types import KINDS
from ..errors import SupremumError
from ..limits.topology import usable_cores
from ..progress import phase
from ..runtime.verify import probe
from .scores import compare, summarise

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # that llama.cpp's attention reads
EXACT = "f16"
KIVI = {"kivi8": 8, "kivi4": 4, "kivi2": 2}  # bits, in Transformers (kivi.py)
POSITIONS = 8  # of each window


@dataclass(frozen=True)
class CacheQuality:
    """A file with a quantised cache against the same file with a float16 one; KL in nats, `same_top` a fraction.

    `kl_reference` and `kl_reference_exact`: to the original, with and without the quantised cache; None without one.
    """

    keys: str
    values: str
    kl_mean: float
    kl_se: float | None
    same_top: float
    perplexity: float
    perplexity_exact: float
    kl_reference: float | None
    kl_reference_exact: float | None
    context: int
    bytes: int
    bytes_exact: int
    positions: int
    windows: int
    runtime: str


def cache_types(text: str) -> tuple[str, str]:
    """"q8_0" or "q8_0,q4_0": the types of keys and of values. Raises SupremumError for others."""
    if text.lower() in KIVI:
        return text.lower(), text.lower()
    names = text.lower().split(",")
    if len(names) > 2 or not set(names) <= set(TYPES):
        raise SupremumError(f"{text!r} is not a type of cache, nor two of them.",
                            f"Give K or K,V of {', '.join(TYPES)}; or one of {', '.join(KIVI)}.")
    return names[0], names[-1]


def cache_bytes(config: Any, types: tuple[str, str], context: int) -> int:
    """Bytes of the cache of `context` tokens, one sequence."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    numbers = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width * context
    total = 0
    for name in types:
        kind = KINDS[name.upper()]
        if width % kind.block:
            raise SupremumError(f"{name} stores {kind.block} numbers together; a head of this model has {width}.",
                                "Choose f16 or bf16 for it.")
        total += numbers // kind.block * kind.nbytes
    return total


def evaluate_cache(checkpoint: Any, reference: Any | None, windows: Tensor, types: tuple[str, str], *,
                   threads: int | None = None) -> CacheQuality:
    """Measure the .gguf file `checkpoint` on windows (n, T) int64, or a folder with a kivi cache; see CacheQuality."""
    if types[0] in KIVI:
        return _evaluate_kivi(checkpoint, windows, types)
    if checkpoint.format != "gguf":
        raise SupremumError(f"{checkpoint.source}: a quantised cache is measured in llama.cpp, which reads .gguf files.",
                            "Convert it first: supremum convert MODEL --target gguf --out DIR")
    length = windows.shape[1]
    nbytes, exact = cache_bytes(checkpoint.config, types, length), cache_bytes(checkpoint.config, (EXACT, EXACT), length)
    ends = sorted({max(1, (length - 1) * (i + 1) // POSITIONS) for i in range(POSITIONS)})
    with phase("answer with the float16 cache"):
        p_PV, version = _answers(checkpoint, windows, ends, (EXACT, EXACT), threads)
    with phase("answer with the quantised cache"):
        q_PV, _ = _answers(checkpoint, windows, ends, types, threads)
    target_P = windows[:, ends].flatten()  # the token behind each prefix
    original_PV = _original(reference, windows, ends) if reference is not None else None

    def score(one_PV: Tensor, other_PV: Tensor) -> Any:
        n = len(ends)
        return summarise(compare(one_PV[at:at + n], other_PV[at:at + n], target_P[at:at + n])
                         for at in range(0, len(target_P), n))  # fmt: skip

    found = score(p_PV, q_PV)
    return CacheQuality(
        keys=types[0], values=types[1], kl_mean=found.kl_mean, kl_se=found.kl_se, same_top=found.same_top,
        perplexity=found.perplexity, perplexity_exact=found.perplexity_reference,
        kl_reference=None if original_PV is None else score(original_PV, q_PV).kl_mean,
        kl_reference_exact=None if original_PV is None else score(original_PV, p_PV).kl_mean,
        context=length, bytes=nbytes, bytes_exact=exact, positions=len(target_P), windows=len(windows), runtime=version)


def _evaluate_kivi(checkpoint: Any, windows: Tensor, types: tuple[str, str]) -> CacheQuality:
    import transformers

    from .kivi import evaluate_kivi

    got = evaluate_kivi(checkpoint, windows, KIVI[types[0]])
    found = got["found"]
    return CacheQuality(
        keys=types[0], values=types[1], kl_mean=found.kl_mean, kl_se=found.kl_se, same_top=found.same_top,
        perplexity=found.perplexity, perplexity_exact=found.perplexity_reference, kl_reference=None,
        kl_reference_exact=None, context=windows.shape[1], bytes=got["bytes"], bytes_exact=got["bytes_exact"],
        positions=windows.numel() - len(windows), windows=len(windows), runtime=f"transformers {transformers.__version__}")


def _answers(checkpoint: Any, windows: Tensor, ends: Sequence[int], types: tuple[str, str],
             threads: int | None) -> tuple[Tensor, str]:
    """(ln p (P, V) float32 behind every prefix, the engine's version), from a fresh process."""
    size = checkpoint.config.vocab_size
    request = {"runtime": "llama_cpp", "path": str(_file(checkpoint)), "threads": threads or usable_cores(), "texts": [],
               "count": size, "context": math.ceil((windows.shape[1] + 16) / 256) * 256, "prompts": windows.tolist(),
               "lengths": [list(ends)] * len(windows), "speed": ([int(windows[0, 0])] * 8, 1), "cache": types}
    ids_PK, log_PK, facts = probe(request, timeout=24 * 3600)
    full_PV = torch.full((len(ids_PK), size), -math.inf).scatter(1, ids_PK, log_PK)
    return full_PV.clamp_min(-200.0), facts["version"]  # llama.cpp says about -inf what it rules out


def _file(checkpoint: Any) -> Path:
    return next(path for path in checkpoint.files if path.suffix == ".gguf")


@torch.inference_mode()
def _original(reference: Any, windows: Tensor, ends: Sequence[int]) -> Tensor:
    model = reference.model(torch.float32)
    with phase("answer with the reference"):
        rows = [model(input_ids=window[None]).logits[0, torch.tensor(ends) - 1].log_softmax(-1) for window in windows]
    return torch.cat(rows)
