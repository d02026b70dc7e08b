"""Smoothing: what makes a layer's inputs hard to round moves into the weights that read them.

    y = W x = (W diag s) (x / s)        s_i = rms(x_i)^a / rms(W_:i)^(1 - a)

(SmoothQuant, Xiao et al. 2022, arXiv 2211.10438; root mean squares where it takes maxima, which one token decides.) The
division costs nothing where it goes into what makes x: the gain of a norm, or the rows of a linear layer (v_proj before
o_proj, up_proj before down_proj). Which module that is, is not looked up: it is tried. A pair stands if random powers of
two, which round nothing, leave the block's float64 output as it was.

The exponent a is chosen per pair by the error that the layers' outputs really have, weights and inputs rounded:

    sum over readers E|Q(W s) q(x / s) - W x|^2 / E|W x|^2

and no factor is taken that does not lower it. What is stored as a float loses nothing: a norm's gain after the division is
a bfloat16 number, and s follows from it; where a bias is divided too, or a layer has no codec to take, s is a power of two.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import codecs
from ..checkpoint import Checkpoint
from ..codecs.activations import rounder
from ..progress import note, track
from ..stats.calls import Call
from ..stats.streaming import BlockStream, linears
from ..stats.sweep import run_block
from ..workspace import Workspace
from .cancellation import nearest

TOKENS = 2048  # of calibration text that inputs are sized on
TRIED, ROWS = 512, 128  # of them, and of each reader's outputs, those whose error chooses
EXPONENTS = (0.4, 0.5, 0.6, 0.7)
RANGE = 2.0**12  # of a factor, either way
SAME = 1e-9  # relative change of a block's output that passes for none
FILE, RECORD = "smoothing.safetensors", "smoothing.json"


@dataclass(frozen=True)
class Pair:
    """A module and the linear layers that read what it makes, by their names inside the block."""

    producer: str
    readers: tuple[str, ...]
    offset: float | None  # of a norm that multiplies by offset + weight; None: a linear layer
    head: int = 0  # channels of a head, where a reader has several heads for one of the producer's

    def widen(self, factor_P: Tensor, width: int) -> Tensor:
        """The producer's factors as the readers' (I,)."""
        return factor_P if len(factor_P) == width else \
            factor_P.view(-1, self.head).repeat_interleave(width // len(factor_P), 0).flatten()

    def narrow(self, size_I: Tensor, width: int) -> Tensor:
        """The largest size over the readers' channels that share one of the producer's."""
        return size_I if len(size_I) == width else \
            size_I.view(width // self.head, -1, self.head).amax(1).flatten()


@dataclass(frozen=True)
class Folded:
    """What became of one pair. Errors: the sum above, of the layers' outputs."""

    producer: str
    readers: tuple[str, ...]
    codec: str
    exponent: float | None  # None where no factor lowered the error
    error_before: float
    error_after: float


@dataclass
class _Seen:
    """One run through a block: modules in the order in which they ran, and which layers read which input."""

    order: list[str] = field(default_factory=list)
    inputs: list[tuple[Tensor, list[str]]] = field(default_factory=list)


def smoothed(stream: BlockStream, windows_NT: Tensor, menu: Mapping[str, Sequence[str]],
             workspace: Workspace) -> tuple[Checkpoint, dict[str, Any]]:
    """The same function with other weights, and what was folded, for supremum.json. menu: tensor name -> codecs.

    Only layers that have a codec which rounds inputs are looked at, for the first such codec."""
    def compute() -> dict[str, Any]:
        found, folded, alone = _fold(stream, windows_NT, menu)
        workspace.save(FILE, found)
        return {"pairs": [asdict(pair) for pair in folded], "not_folded": alone}

    record = workspace.json(RECORD, compute)
    if record["not_folded"]:
        note(f"not smoothed: {len(record['not_folded'])} inputs, made by nothing that can be divided "
             f"(the first: {record['not_folded'][0]}).")
    factors = workspace.load(FILE)
    return stream.checkpoint.changed(lambda name, weight: changed(factors, name, weight)), record


def changed(factors: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    """The folded tensor: a matrix in float32, a gain or a bias in its own type. Keys of factors: "columns|NAME"
    (multiplied), "rows|NAME" (divided) and of a norm with an offset "gain|NAME" (divided) and "offset|NAME"."""
    value = weight
    if (column_I := factors.get(f"columns|{name}")) is not None:
        value = value.double() * column_I
    if (row_O := factors.get(f"rows|{name}")) is not None:
        value = value.double() / (row_O[:, None] if value.ndim == 2 else row_O)
    if (gain_I := factors.get(f"gain|{name}")) is not None:
        offset = factors[f"offset|{name}"]
        value = (value.double() + offset) / gain_I - offset
    return value if value is weight else value.float() if weight.ndim == 2 else value.to(weight.dtype)


def _fold(stream: BlockStream, windows_NT: Tensor, menu: Mapping[str, Sequence[str]],
          ) -> tuple[dict[str, Tensor], list[Folded], list[str]]:
    """(factors, what was folded, first readers of inputs that were not)."""
    sample_NT = windows_NT[:max(1, TOKENS // windows_NT.shape[1])]
    shared = {*stream.checkpoint.tied, *stream.checkpoint.tied.values()}
    config = stream.model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // (getattr(config, "num_attention_heads", None) or 1)
    hidden_NTd = stream.embed(sample_NT)
    factors: dict[str, Tensor] = {}
    folded: list[Folded] = []
    alone: list[str] = []
    pairs: list[Pair] = []
    done: set[str] = set()
    for call in track(stream.calls(windows_NT), "smooth"):
        with stream.block(call.block) as block:
            if call.block in done:  # used again: its factors are those of the first use
                hidden_NTd = run_block(block, call, hidden_NTd)
                continue
            done.add(call.block)
            kinds = {name: next(filter(rounder, menu.get(f"{call.block}.{name}.weight", ())), None)
                     for name in linears(block)}
            with _watch(block) as seen:
                output_NTd = run_block(block, call, hidden_NTd)
            groups = [(x_NTI, names) for x_NTI, names in seen.inputs if any(kinds[name] for name in names)]
            pairs = find_pairs(block, call.at(slice(0, 1)), hidden_NTd[:1], seen.order, [names for _, names in groups],
                               head, pairs)
            for x_NTI, names in groups:
                pair = next((pair for pair in pairs if pair.readers == tuple(names)), None)
                tensors = [f"{call.block}.{name}.weight" for name in (pair.producer if pair else names[0], *names)]
                if pair is None or shared & set(tensors):
                    alone.append(tensors[1])
                    continue
                found, factor_P = choose(block, pair, call.at(slice(0, len(x_NTI))).rows(x_NTI).float(), kinds)
                folded.append(replace(found, producer=f"{call.block}.{pair.producer}",
                                      readers=tuple(f"{call.block}.{name}" for name in names)))
                if found.exponent is not None:
                    factors |= _entries(call.block, block, pair, factor_P, x_NTI.shape[-1])
        hidden_NTd = output_NTd
    return factors, folded, alone


def _entries(place: str, block: nn.Module, pair: Pair, factor_P: Tensor, width: int) -> dict[str, Tensor]:
    producer, name = block.get_submodule(pair.producer), f"{place}.{pair.producer}"
    found = {f"columns|{place}.{reader}.weight": pair.widen(factor_P, width) for reader in pair.readers}
    if pair.offset:
        found |= {f"gain|{name}.weight": factor_P, f"offset|{name}.weight": torch.tensor(pair.offset).double()}
    else:
        found[f"rows|{name}.weight"] = factor_P
    if getattr(producer, "bias", None) is not None:
        found[f"rows|{name}.bias"] = factor_P.clone()
    return {key: value.contiguous().clone() for key, value in found.items()}


@contextlib.contextmanager
def _watch(block: nn.Module) -> Iterator[_Seen]:
    """Yield what runs. Inputs of the first batch only are kept: all of a sample of TOKENS."""
    seen = _Seen()

    def hook(name: str, reads: bool) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in seen.order:
                seen.order.append(name)
                if reads:
                    same = next((names for x_NTI, names in seen.inputs if x_NTI is args[0]), None)
                    if same is None:
                        seen.inputs.append((args[0], [name]))
                    else:
                        same.append(name)
        return before

    layers = linears(block)
    handles = [module.register_forward_pre_hook(hook(name, name in layers)) for name, module in block.named_modules()
               if name in layers or _is_gain(module)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_gain(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


# -- which pairs there are --------------------------------------------------------------------------------------------


def find_pairs(block: nn.Module, call: Call, hidden_NTd: Tensor, order: Sequence[str], groups: Sequence[Sequence[str]],
               head: int, known: Sequence[Pair] = ()) -> list[Pair]:
    """The pairs of a block. order: modules as they run. groups: layers that read the same input. known: those of the block
    before, which are tried first, all at once."""
    exact = copy.deepcopy(block).double()
    trial = replace(call, args=_double(call.args), kwargs=_double(call.kwargs))
    hidden_NTd = hidden_NTd.double()

    def stands(pairs: Sequence[Pair]) -> bool:
        one, other = (_trial(exact, trial, hidden_NTd, pairs, fold=fold) for fold in (False, True))
        return bool((one - other).abs().max() <= SAME * one.abs().max())

    names = {name for name, _ in exact.named_modules()}
    if known and {pair.readers for pair in known} <= {tuple(group) for group in groups} and \
            {pair.producer for pair in known} <= names and stands(known):
        return list(known)
    found: list[Pair] = []
    for group in groups:
        before = order[:order.index(group[0])]
        tries = (pair for name in reversed(before) for pair in _possible(exact, name, tuple(group), head))
        if (pair := next((pair for pair in tries if stands([pair])), None)) is not None:
            found.append(pair)
    return found


def _possible(block: nn.Module, name: str, readers: tuple[str, ...], head: int) -> list[Pair]:
    producer, width = block.get_submodule(name), _weight(block, readers[0]).shape[1]
    if _is_gain(producer):
        return [Pair(name, readers, offset) for offset in (0.0, 1.0)] if len(_weight(block, name)) == width else []
    if not isinstance(producer, nn.Linear):
        return []
    rows = producer.weight.shape[0]
    return [Pair(name, readers, None, head)] if rows == width or (width % rows == 0 and rows % head == 0) else []


def _trial(block: nn.Module, call: Call, hidden_NTd: Tensor, pairs: Sequence[Pair], *, fold: bool) -> Tensor:
    """The block's output with norms of gain 1, or with every pair folded by random powers of two: then no product and no
    sum is rounded otherwise, even where a norm or a softmax computes in float32."""
    draw = torch.Generator().manual_seed(0)
    kept = [(own, own.detach().clone()) for pair in pairs for name in (pair.producer, *pair.readers)
            for own in block.get_submodule(name).parameters(recurse=False)]
    try:
        with torch.no_grad():
            for pair in pairs:
                producer, width = block.get_submodule(pair.producer), _weight(block, pair.readers[0]).shape[1]
                rows = len(_weight(block, pair.producer))
                factor_P = 2.0 ** torch.randint(-2, 3, (rows,), generator=draw).double() if fold else \
                    torch.ones(rows).double()
                if pair.offset is not None:
                    producer.weight.copy_(1 / factor_P - pair.offset)  # type: ignore[operator]
                else:
                    producer.weight.div_(factor_P[:, None])  # type: ignore[operator]
                if getattr(producer, "bias", None) is not None:
                    producer.bias.div_(factor_P)  # type: ignore[operator]
                for reader in pair.readers:
                    _weight(block, reader).mul_(pair.widen(factor_P, width))
            return call.output(block, hidden_NTd)
    finally:
        with torch.no_grad():
            for own, value in kept:
                own.copy_(value)


def _weight(block: nn.Module, name: str) -> Tensor:
    weight: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
    return weight.detach()


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_double, value))
    return {key: _double(one) for key, one in value.items()} if isinstance(value, dict) else value


# -- how much ---------------------------------------------------------------------------------------------------------


def choose(block: nn.Module, pair: Pair, x_TI: Tensor, kinds: Mapping[str, str | None]) -> tuple[Folded, Tensor]:
    """(what was chosen, the producer's factors). kinds: linear layer -> its codec, or None if it stays as it is."""
    producer, width = block.get_submodule(pair.producer), len(_weight(block, pair.producer))
    weights = {name: _weight(block, name).float() for name in pair.readers}
    touched = (*pair.readers, pair.producer) if pair.offset is None else pair.readers
    whole = getattr(producer, "bias", None) is not None or not all(kinds[name] for name in touched)
    gain_P = _weight(block, pair.producer).double() + pair.offset if pair.offset is not None else None
    column_I = torch.cat(list(weights.values())).square().mean(0).sqrt()
    weight_P = pair.narrow(column_I, width).double()
    coded = {name: (weight_OI[::-(-len(weight_OI) // ROWS)], str(kinds[name])) for name, weight_OI in weights.items()
             if kinds[name]}
    some_TI = x_TI[::-(-len(x_TI) // TRIED)]  # windows' first tokens, whose inputs are the largest, among them
    size_P = pair.narrow(x_TI.square().mean(0).sqrt(), width).double()
    best, found = torch.ones(width).double(), None
    before = least = output_error(coded, some_TI, torch.ones(x_TI.shape[1]))
    for exponent in EXPONENTS:
        factor_P = factors_of(size_P, weight_P, exponent)
        factor_P = 2.0 ** factor_P.log2().round() if whole else factor_P if gain_P is None else \
            _storable(gain_P, factor_P, pair.offset or 0.0)
        error = output_error(coded, some_TI, pair.widen(factor_P, x_TI.shape[1]).float())
        if error < least:
            best, least, found = factor_P, error, exponent
    codec = next(codec for _, codec in coded.values())
    return Folded(pair.producer, pair.readers, codec, found, before, least), best


def factors_of(size_P: Tensor, weight_P: Tensor, exponent: float) -> Tensor:
    """s = x^a / w^(1 - a), of geometric mean 1; 1 where there is nothing to scale."""
    factor_P = size_P**exponent / weight_P ** (1 - exponent)
    real_P = (size_P > 0) & (weight_P > 0)
    factor_P = factor_P / factor_P[real_P].log().mean().exp()
    return torch.where(real_P, factor_P.clamp(1 / RANGE, RANGE), 1.0)


def _storable(gain_P: Tensor, factor_P: Tensor, offset: float) -> Tensor:
    """The nearest factors that leave a bfloat16 weight in the norm."""
    left_P = (gain_P / factor_P - offset).bfloat16().double() + offset
    found_P = gain_P / left_P
    return torch.where(found_P.isfinite() & (found_P >= 0.5 / RANGE) & (found_P <= 2 * RANGE), found_P, 1.0)


def output_error(coded: Mapping[str, tuple[Tensor, str]], x_TI: Tensor, factor_I: Tensor) -> float:
    """sum over readers E|Q(W s) q(x / s) - W x|^2 / E|W x|^2. coded: reader -> (W, codec)."""
    total = 0.0
    for weight_OI, codec in coded.values():
        apply = rounder(codec)
        assert apply is not None
        rounded_TI = apply(x_TI / factor_I)
        weighed_OI = nearest(weight_OI * factor_I, codecs.get(codec)).decode()
        y_TO = x_TI @ weight_OI.T
        total += float((rounded_TI @ weighed_OI.T - y_TO).square().sum() / y_TO.square().sum().clamp_min(1e-30))
    return total
