"""The global stage: what no code holds, trained on the KL to the original through the whole model.

    gain_i = g_i + rms(g) theta_i        scale_o = s_o (1 + theta_o)        min over theta of mean_t KL(p_t || q_t)

Gains are the blocks' vectors: norms and biases. A row's scales move together where the format can store it; of powers of two
(MXFP4), shared tiles and an archive's steps it cannot, and the gains move alone. Codes stay: they were chosen layer by layer,
and what the layers do to each other a few numbers in full precision can still mend (norm tweaking: Li et al. 2024, arXiv
2309.02784; scales end to end: EfficientQAT, Chen et al. 2024, arXiv 2407.11062).

Adam, a few windows of the calibration text a step, each window once a pass. After a pass the model is measured as it would
be stored; a pass that lowers the KL is kept, and the first that buys less than LEAST is the last. Blocks are streamed, there
and back: one of them is in memory, with the hidden states of one step's windows. Each step is kept, for a run that resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div

from ..checkpoint.architecture import objective
from ..checkpoint.targets import LazyCoded
from ..codecs import Coded
from ..measure.scores import feature_kl
from ..measure.streamed import replacing, streamed_quality
from ..progress import track
from ..stats.calls import Call
from ..stats.streaming import BlockStream, linears, orientation
from ..stats.sweep import batches, hidden_file
from ..text.pairs import answering
from ..workspace import Workspace

TOKENS = 1024  # of a step
RATE, WARM = 2e-3, 0.2  # of Adam, in units of theta: the largest, and the share of a pass that leads up to it
FIRST, SECOND, TINY = 0.9, 0.95, 1e-8  # of Adam: decay of the means of gradients and of their squares, and epsilon
PASSES, LEAST = 3, 0.02  # share of the KL that a pass has to buy for another to follow
WORTH = 0.003  # nats a token: what is nearer to the original is left as it is

Divergence = Callable[[Tensor, Tensor], Tensor]  # last hidden states (1, T, d) of the original and ours -> d mean KL / d ours


@dataclass(frozen=True)
class Trained:
    """The matrices, the vectors that go with them (by tensor name, as they are stored), and their quality."""

    coded: LazyCoded
    vectors: dict[str, Tensor]
    quality: dict[str, Any]
    record: dict[str, Any] | None  # what the stage bought; None where it did not run


@dataclass(frozen=True)
class _Numbers:
    """What is trained: where in theta (P,) each tensor's numbers lie, and of vectors what they are now."""

    places: dict[str, slice]
    vectors: dict[str, Tensor]

    @property
    def count(self) -> int:
        return max((place.stop for place in self.places.values()), default=0)

    def vector(self, name: str, theta_P: Tensor) -> Tensor:
        """The trained vector, float32."""
        value = self.vectors[name].float()
        return value + value.square().mean().sqrt() * theta_P[self.places[name]]

    def stored(self, coded: LazyCoded, theta_P: Tensor) -> tuple[LazyCoded, dict[str, Tensor]]:
        """Matrices and vectors as the formats hold them."""
        def load(name: str) -> Coded:
            return scaled(coded[name], 1 + theta_P[self.places[name]]) if name in self.places else coded[name]

        return LazyCoded(coded.plan, load), {name: self.vector(name, theta_P).to(old.dtype)
                                             for name, old in self.vectors.items()}

    def run(self, block: nn.Module, call: Call, hidden_NTd: Tensor, theta_P: Tensor) -> Tensor:
        """The block's output with the trained numbers."""
        vectors = {name.removeprefix(f"{call.block}."): self.vector(name, theta_P).to(hidden_NTd.dtype)
                   for name in self.vectors if name.startswith(f"{call.block}.")}
        handles = [layer.register_forward_hook(_times(1 + theta_P[place].to(hidden_NTd.dtype)))
                   for name, layer in linears(block).items()
                   if (place := self.places.get(f"{call.block}.{name}.weight")) is not None]
        try:
            return call.run(lambda *args, **kwargs: functional_call(block, vectors, args, kwargs), hidden_NTd)
        finally:
            for handle in handles:
                handle.remove()


def _times(factor_O: Tensor) -> Any:
    """A hook: the layer's weight, not its bias, is multiplied by a factor a row."""
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias: Any = layer.bias
        return output * factor_O if bias is None else (output - bias) * factor_O + bias
    return hook


def scaled(coded: Coded, factor_O: Tensor) -> Coded:
    """The same codes under scales (and offsets) times a factor a row, as near as the format can store them."""
    codes_OI, grid = coded.codec.unpack(coded.tensors, coded.shape)
    factor_O1 = factor_O[:, None]
    grid = coded.codec.project(grid.scale_OG * factor_O1, None if grid.offset_OG is None else grid.offset_OG * factor_O1)
    return Coded(coded.codec, coded.codec.pack(codes_OI, grid), coded.shape)


def takes_factors(coded: Any) -> bool:
    """Whether the format stores a change of one per cent of its rows' scales about right on the mean."""
    if not isinstance(coded, Coded) or coded.codec.rows > 1:
        return False
    _, grid = coded.codec.unpack(coded.tensors, coded.shape)
    moved = coded.codec.project(grid.scale_OG * 1.01, None if grid.offset_OG is None else grid.offset_OG * 1.01)
    return 1.007 < float(moved.scale_OG.abs().double().sum() / grid.scale_OG.abs().double().sum()) < 1.013


def train_gains(stream: BlockStream, windows_NT: Tensor, held_out_NT: Tensor, reference_NTd: Tensor, workspace: Workspace,
                coded: LazyCoded, folder: str, *, quick: bool = False) -> Trained:
    """Measure `coded` on the held-out windows and train what no code holds; quick: do not train. `sweep` must have run on
    `windows`.

    reference: the original's `final_hidden` on the held-out windows. Files: FOLDER/quality.json, and of pass K
    FOLDER/gains/K.safetensors, the state after its last finished step, and FOLDER/gains/K.json, its measurement.
    """
    def measured(file: str, matrices: LazyCoded, vectors: Mapping[str, Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = workspace.json(f"{folder}/{file}.json", lambda: streamed_quality(
            stream, held_out_NT, reference_NTd,
            lambda name: vectors[name] if name in vectors else matrices.decoded(name), "measure the result",
            coded.plan.get).to_dict())
        return found

    best = Trained(coded, {}, measured("quality", coded, {}), None)
    first = best.quality["kl_mean"]
    if first < WORTH or quick:
        return best
    numbers, passes = _numbers(stream, coded), []
    theta_P = torch.zeros(numbers.count)
    for k in range(PASSES if numbers.count else 0):
        theta_P, seconds = _pass(stream, windows_NT, workspace, coded, numbers, theta_P, f"{folder}/gains/{k}.safetensors", k)
        matrices, vectors = numbers.stored(coded, theta_P)
        found, before = measured(f"gains/{k}", matrices, vectors), best.quality["kl_mean"]
        passes.append({"kl": found["kl_mean"], "seconds": seconds})
        if found["kl_mean"] < before:
            best = Trained(matrices, vectors, found, None)
        if found["kl_mean"] > (1 - LEAST) * before:
            break
    record = {"numbers": numbers.count, "kl_before": first, "kl_after": best.quality["kl_mean"], "passes": passes}
    return replace(best, record=record)


def _numbers(stream: BlockStream, coded: LazyCoded) -> _Numbers:
    checkpoint, shapes = stream.checkpoint, orientation(stream)
    first = {codec: name for name, codec in reversed(list(coded.plan.items()))}
    fine = {codec for codec, name in first.items() if takes_factors(coded[name])}
    vectors, sizes = {}, {}
    for block, module in stream.blocks.items():
        for inner, parameter in module.named_parameters():
            name = f"{block}.{inner}"
            if parameter.ndim == 1 and name in checkpoint.tensors and parameter.is_floating_point():
                vectors[name] = checkpoint.read(name)
                sizes[name] = len(parameter)
            elif coded.plan.get(name) in fine:
                sizes[name] = shapes[name][0][0]
    ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
    return _Numbers({name: slice(start, stop) for name, start, stop in zip(sizes, ends, ends[1:], strict=False)}, vectors)


def _pass(stream: BlockStream, windows_NT: Tensor, workspace: Workspace, coded: LazyCoded, numbers: _Numbers,
          theta_P: Tensor, file: str, seed: int) -> tuple[Tensor, float]:
    """All windows once, in an order drawn by `seed`: theta (P,), and the seconds of it."""
    order_N = torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(seed))
    parts = order_N.split(max(1, TOKENS // windows_NT.shape[1]))
    state = workspace.load(file) if workspace.has(file) else {
        "theta": theta_P, "first": torch.zeros_like(theta_P), "second": torch.zeros_like(theta_P),
        "steps": torch.zeros((), dtype=torch.long), "seconds": torch.zeros((), dtype=torch.double)}
    done = int(state["steps"])
    if done == len(parts):
        return state["theta"], float(state["seconds"])
    calls = stream.calls(windows_NT)
    goal_NTd = workspace.load(hidden_file(len(calls)))["h"]
    with replacing(stream, coded.decoded, coded.plan.get):
        entry_NTd = torch.cat([stream.embed(windows_NT[part]) for part in batches(windows_NT)])
        with _heads(stream) as divergence:
            for step, part in enumerate(track(parts[done:], "train gains and scales"), done + 1):
                started = time.perf_counter()
                gradient_P = _gradient(stream, [call.at(part) for call in calls], numbers, state["theta"], entry_NTd[part],
                                       goal_NTd[part], answering(windows_NT[part]), divergence)
                state["first"].lerp_(gradient_P, 1 - FIRST)
                state["second"].lerp_(gradient_P.square(), 1 - SECOND)
                size_P = (state["second"] / (1 - SECOND**step)).sqrt_().add_(TINY)
                share = (step - 0.5) / len(parts)
                rate = RATE * min(share / WARM, (1 - share) / (1 - WARM))
                state["theta"].addcdiv_(state["first"], size_P, value=-rate / (1 - FIRST**step))
                state["steps"] += 1
                state["seconds"] += time.perf_counter() - started
                workspace.save(file, state)
    return state["theta"], float(state["seconds"])


def _gradient(stream: BlockStream, calls: list[Call], numbers: _Numbers, theta_P: Tensor, hidden_NTd: Tensor,
              goal_NTd: Tensor, answers_NT: Tensor, divergence: Divergence) -> Tensor:
    """d mean KL / d theta (P,) over some windows. hidden: what enters the first block; goal: the original's last; answers:
    the positions that answer."""
    states = []
    for call in calls:
        states.append(hidden_NTd)
        with stream.block(call.block) as block, torch.no_grad():
            hidden_NTd = numbers.run(block, call, hidden_NTd, theta_P)
    upper_NTd = torch.zeros_like(hidden_NTd)
    for n, answer_T in enumerate(answers_NT):
        share = int(answer_T.sum()) / int(answers_NT.sum())
        upper_NTd[n, answer_T] = share * divergence(goal_NTd[n:n + 1, answer_T], hidden_NTd[n:n + 1, answer_T])[0]
    gradient_P = torch.zeros_like(theta_P)
    for call, entry_NTd in zip(reversed(calls), reversed(states), strict=True):
        with stream.block(call.block) as block, torch.enable_grad():
            entry, theta = entry_NTd.detach().requires_grad_(True), theta_P.detach().requires_grad_(True)
            upper_NTd, share_P = torch.autograd.grad(numbers.run(block, call, entry, theta), [entry, theta], upper_NTd)
        gradient_P += share_P
    return gradient_P


@contextmanager
def _heads(stream: BlockStream) -> Iterator[Divergence]:
    """The gradient of a window's mean KL. Of a model without a vocabulary head it is that of `feature_kl`."""
    features = objective(type(stream.model).__name__) == "none"
    original = BlockStream(stream.checkpoint, dtype=stream.dtype)
    with original.head() as head_p, stream.head() as head_q:
        def gradient(goal_1Td: Tensor, hidden_1Td: Tensor) -> Tensor:
            with torch.no_grad():
                p_1TV = head_p(goal_1Td).float()
            with torch.enable_grad():
                entry = hidden_1Td.detach().requires_grad_(True)
                q_1TV = head_q(entry).float()
                if features:
                    variance_D = p_1TV.flatten(0, 1).var(0, unbiased=False)
                    loss = feature_kl(p_1TV[0], q_1TV[0], variance_D).mean()
                else:
                    loss = kl_div(q_1TV.log_softmax(-1), p_1TV.log_softmax(-1), reduction="sum", log_target=True)
                    loss = loss / q_1TV.shape[1]
                return torch.autograd.grad(loss, entry)[0]

        yield gradient
