"""The least time of a decode step and of a prefill on a measured machine, and what fits into its memory.

Letters: N weights read for one token, b_w bits a weight with its scales, L layers, h and h_kv query and key/value
heads, d head size, S context, B batch, BW bytes and P operations per second, both measured (`hardware`).

    decode    bytes = N b_w / 8 + B S 2 L h_kv d b_kv / 8      operations = 2 N B + 4 B L h d S
    prefill   bytes = N b_w / 8 + B S 2 L h_kv d b_kv / 8      operations = 2 N_blocks B S + 2 B L h d S^2 + 2 N_head B
    seconds >= max(bytes / BW, operations / P)

N counts the output head, tied or not, and no embedding table (one row a token is read). A layer with a sliding window
w reads min(S, w) positions; an encoder attends to all pairs, 4 B L h d S^2. BW is the rate measured for a working set
of `bytes`, so a small model gets the cache that it lives in. MoE: B tokens meet E (1 - (1 - k/E)^B) distinct experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoint.architecture import objective
from ..checkpoint.gguf_types import KINDS
from .hardware import Machine
from .topology import home

CHUNK = 512  # tokens of a prompt that a runtime usually computes at a time


@dataclass(frozen=True)
class Format:
    """A way to store weights: its rate, and the data types that a kernel may multiply in."""

    name: str
    bits: float  # per weight, scales included
    dtypes: tuple[str, ...]


def formats(names: Sequence[str] = ("F32", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q3_K", "Q2_K")) -> list[Format]:
    """GGUF's block formats, at their true rate. Formats of up to 8 bits may be multiplied as 8-bit integers."""
    out: list[Format] = []
    for name in names:
        bits = 8 * KINDS[name].nbytes / KINDS[name].block
        dtypes = ("float32", "bfloat16", "float16", "int8") if bits < 16 else ("float32", "bfloat16", "float16")
        out.append(Format(name, bits, ("float32",) if name == "F32" else dtypes))
    return out


@dataclass(frozen=True)
class Workload:
    """What one token asks of the machine, from the configuration and the module tree."""

    block_weights: int  # matrices of the blocks, every one read for every token
    expert_weights: int  # matrices of all experts of all layers
    experts: int  # per layer; 0 without
    experts_used: int
    head_weights: int
    table_weights: int  # embedding tables, poolers, the encoder before a decoder: not multiplied for every token
    tied: bool  # head and table are one matrix
    repeated_weights: int  # multiplications a token beyond one a weight (ALBERT's layers share one block)
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]  # positions that each layer sees; None: all
    causal: bool
    positions: int  # that the model was made for

    def weights_read(self, batch: int = 1) -> float:
        """N: weights that one decode step of `batch` sequences reads."""
        touched = 1 - (1 - self.experts_used / self.experts) ** batch if self.experts else 0.0
        return self.block_weights + touched * self.expert_weights + self.head_weights

    @property
    def weights_used(self) -> float:
        """Weights of the blocks that one token is multiplied by."""
        share = self.experts_used / self.experts if self.experts else 0.0
        return self.block_weights + self.repeated_weights + share * self.expert_weights

    @property
    def weights_stored(self) -> int:
        one = min(self.head_weights, self.table_weights) if self.tied else 0
        return self.block_weights + self.expert_weights + self.head_weights + self.table_weights - one

    def kv_bytes(self, context: int, kv_bits: float = 16) -> float:
        """Bytes of the key/value cache of one sequence of `context` tokens."""
        if not self.causal:
            return 0.0
        return sum(self.seen(context)) * 2 * self.kv_heads * self.head_size * kv_bits / 8

    def seen(self, context: int) -> list[int]:
        return [context if window is None else min(context, window) for window in self.windows]


def workload(config: Any, module: nn.Module) -> Workload:
    """The workload of a Transformers configuration and its module tree (parameters may be on the meta device)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None  # type: ignore[operator]
    experts = next((int(n) for key in ("num_local_experts", "num_experts", "n_routed_experts")
                    if (n := getattr(text, key, None))), 0)  # fmt: skip
    blocks = shared = expert_weights = tables = 0
    whole: Any = module
    encoder = set(whole.get_encoder().modules()) if getattr(config, "is_encoder_decoder", False) else set()
    for name, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(part, nn.Embedding) or "pooler" in name or part in encoder:
                tables += parameter.numel()
            elif parameter.ndim < 2 or part is head:
                continue
            elif experts and parameter.ndim == 3 and parameter.shape[0] == experts:
                expert_weights += parameter.numel()
            else:
                blocks += parameter.numel()
                shared += parameter.numel() if "layer_groups" in name else 0
    layers, heads, hidden = int(text.num_hidden_layers), int(text.num_attention_heads), int(text.hidden_size)
    groups = getattr(text, "num_hidden_groups", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    weight = getattr(head, "weight", None)
    return Workload(
        block_weights=blocks,
        expert_weights=expert_weights,
        experts=experts if expert_weights else 0,
        experts_used=int(getattr(text, "num_experts_per_tok", 0) or 0),
        head_weights=weight.numel() if weight is not None else 0,
        table_weights=tables,
        tied=bool(getattr(config, "tie_word_embeddings", False)) and weight is not None,
        repeated_weights=shared * (layers - groups) // groups if groups else 0,
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or hidden // heads),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        causal=objective(type(module).__name__) == "next",
        positions=int(getattr(text, "max_position_embeddings", None) or 0),
    )


@dataclass(frozen=True)
class Ceiling:
    """The most tokens per second that this machine can give; a bound."""

    phase: str  # "decode" or "prefill"
    format: str
    bits: float
    context: int
    batch: int
    tokens_per_s: float
    seconds: float  # of one step over the batch, or of the whole prompt
    limited_by: str  # "memory" or "arithmetic"
    nbytes: float  # read in that time
    operations: float
    gb_s: float  # the measured rate used
    lives_in: str  # the level that holds what a step reads


def _ceiling(phase: str, tokens: int, form: Format, context: int, batch: int, nbytes: float, operations: float,
             machine: Machine) -> Ceiling:  # fmt: skip
    rate = machine.bandwidth(int(nbytes))
    peak = machine.peak(form.dtypes)
    reading, computing = nbytes / rate, operations / peak if peak else 0.0
    seconds = max(reading, computing)
    return Ceiling(
        phase, form.name, form.bits, context, batch, tokens / seconds, seconds,
        "memory" if reading >= computing else "arithmetic", nbytes, operations, rate / 1e9, machine.home(int(nbytes)),
    )  # fmt: skip


def decode(
    work: Workload, machine: Machine, form: Format, *, context: int, batch: int = 1, kv_bits: float = 16
) -> Ceiling:
    """Ceiling of one decode step: `batch` sequences that hold `context` tokens each get one more."""
    nbytes = work.weights_read(batch) * form.bits / 8 + batch * work.kv_bytes(context, kv_bits)
    operations = 2.0 * (work.weights_used + work.head_weights) * batch
    operations += 4.0 * batch * work.heads * work.head_size * sum(work.seen(context))
    return _ceiling("decode", batch, form, context, batch, nbytes, operations, machine)


def prefill(
    work: Workload, machine: Machine, form: Format, *, context: int, batch: int = 1, kv_bits: float = 16
) -> Ceiling:
    """Ceiling of reading `batch` prompts of `context` tokens (or of encoding them)."""
    nbytes = work.weights_read(batch * context) * form.bits / 8 + batch * work.kv_bytes(context, kv_bits)
    pairs = sum(s * context - s * s / 2 if work.causal else s * context for s in work.seen(context))
    heads = work.head_weights * (1 if work.causal else context)
    operations = 2.0 * batch * (work.weights_used * context + heads) + 4.0 * batch * work.heads * work.head_size * pairs
    return _ceiling("prefill", batch * context, form, context, batch, nbytes, operations, machine)


@dataclass(frozen=True)
class Capacity:
    """What a model needs in memory at one context and batch; weights and cache exact, activations an estimate."""

    format: str
    bits: float
    context: int
    batch: int
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    memory_bytes: int
    fits: bool
    longest_context: int  # at this batch; 0: not even the weights fit
    lives_in: str  # the level of the memory hierarchy that holds the weights


def capacity(
    work: Workload, machine: Machine, form: Format, *, context: int, batch: int = 1, kv_bits: float = 16
) -> Capacity:
    """Whether weights, cache and activations (float32 rows of one chunk of a prompt, and the logits) fit."""
    weights = work.weights_stored * form.bits / 8

    def activations(length: int) -> float:
        rows = batch * min(length, CHUNK) if work.causal else batch * length
        return 4.0 * (rows * (6 * work.hidden + 2 * work.intermediate) + batch * work.vocabulary)

    def total(length: int) -> float:
        return weights + batch * work.kv_bytes(length, kv_bits) + activations(length)

    low, high = 0, work.positions or context  # the longest context that the model and the memory both allow
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(middle) <= machine.memory_bytes else (low, middle - 1)
    return Capacity(
        form.name, form.bits, context, batch, weights, batch * work.kv_bytes(context, kv_bits), activations(context),
        machine.memory_bytes, total(context) <= machine.memory_bytes, low,
        home(int(weights), machine.caches, machine.cores),
    )  # fmt: skip


@dataclass(frozen=True)
class HardwareLimit:
    """Everything that the machine says about one model."""

    machine: Machine
    workload: Workload
    ceilings: tuple[Ceiling, ...]
    capacities: tuple[Capacity, ...]
    assumptions: tuple[str, ...]


ASSUMPTIONS = (
    "every weight of the blocks and the head is read once a step, the key/value cache (16 bits) once, nothing else",
    "reading at the best rate measured for a working set of that size, arithmetic at the best measured product rate",
    "formats of up to 8 bits may be multiplied as 8-bit integers; unpacking, norms, sampling and launches cost nothing",
)


def hardware_limit(
    work: Workload,
    machine: Machine,
    *,
    kinds: Iterable[Format] | None = None,
    contexts: Sequence[int] = (128, 2048, 32768),
    batches: Sequence[int] = (1, 8, 64),
) -> HardwareLimit:
    """Ceilings and capacities for each format, context (up to the model's own) and batch."""
    kinds = list(kinds if kinds is not None else formats())
    longest = work.positions or max(contexts)
    said = list(ASSUMPTIONS)
    if machine.busy > 0.1:
        said.append(f"others used {100 * machine.busy:.0f} % of the processors meanwhile: the true ceilings are higher")
    lengths = sorted({min(context, longest) for context in contexts})
    grid = [(form, context, batch) for form in kinds for context in lengths for batch in batches]
    phases = (decode, prefill) if work.causal else (prefill,)
    return HardwareLimit(
        machine, work,
        tuple(phase(work, machine, f, context=c, batch=b) for phase in phases for f, c, b in grid),
        tuple(capacity(work, machine, f, context=c, batch=b) for f, c, b in grid),
        tuple(said),
    )  # fmt: skip
