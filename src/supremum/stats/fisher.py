"""The backward sweep: how much the model's answers move when a layer's output or weight moves.

With labels y sampled from the model's own prediction and g = d log p(y) / d(layer output),

    B = E[g g^T]                      (O, O) per token, or its diagonal: the output Fisher
    w_t = |g_t|                       what a token's error in a layer's input weighs
    KL(dW) ~ c/2 tr(B dW S dW^T)      nats a token, S = E[x x^T]: what a change of a layer's weight costs (K-FAC for c = 1)

B is a mean over few sequences, and the tokens of one are alike: its small eigenvalues come out too small, which a limit
drawn from them would promise to use. `shrunk` mixes in the share r of mean(diag B) I that loses least in Frobenius norm
(Ledoit & Wolf 2004), with whole sequences as the independent samples:

    r = (E_s |B_s|^2 - |B|^2) / N  /  (|B|^2 - tr(B)^2 / O)      B_s the mean over sequence s of N; E_s over SHARED of them

Of the head's logits the labels' distribution is known, so their B is a mean over it and not over draws (`_add_label_fisher`).

The weights stand in the second moment of the final solve, E[w x x^T], for what B (x) S leaves out: that g and x go together
(GuidedQuant, arXiv 2505.07004, takes |g_t|^2; of one drawn label that is mostly noise, and its root does better here).

To second order and given the text a sequence costs <G_s, dW>^2 / 2, G_s = sum_t g_t x_t^T, as scores of different positions
are uncorrelated. Of one dW and few sequences that is mostly noise, of all that error feedback may leave it is not: rows of dW
with covariance S^-1 cost |G_s S^-1/2|^2 / 2 on the mean, and K-FAC's tr(B) I / 2 a token. Their ratio is the layer's coupling

    c = E_s |sum_t g_t (S^-1/2 x_t)^T|^2  /  (E_s sum_t |g_t|^2  tr(S S^-1))        S^-1 of S + COUPLING_RIDGE mean(diag S) I

of inputs and gradients. It is least for values, whose errors attention averages over positions.

A model without a vocabulary head is read as a Gaussian around its output with the output's own variance: KL is then half the
relative squared error summed over features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import track
from ..text.pairs import answering
from ..workspace import Workspace
from .streaming import BlockStream, linears
from .sweep import accumulate, batches, hidden_file, moments

SHARED = 8  # sequences, spread evenly over all, that say how B is shrunk
HEAD_FISHER = "fisher/head.safetensors"
COUPLING_RIDGE = 0.01  # share of S's mean diagonal that is added before it is inverted
FULL_FISHER = 4096  # outputs up to which B is kept whole; beyond, its diagonal


def fisher_file(call: int) -> str:
    return f"fisher/{call:04d}.safetensors"


def gradient_file(call: int) -> str:
    return f"gradient/{call:04d}.safetensors"


def score(output: Tensor, generator: torch.Generator) -> Tensor:
    """d log p(y | output) / d output with y sampled, of logits (N, T, V) or features (N, T, d): one-hot(y) - p."""
    if output.shape[-1] < 2 or not output.is_floating_point():
        raise ValueError("the model's output is neither logits nor features")
    p = torch.softmax(output.detach().float(), -1)
    below = p.cumsum(-1)  # one uniform draw a position: torch.multinomial draws one for every token
    drawn = torch.rand((*output.shape[:-1], 1), generator=generator) * below[..., -1:]
    labels = torch.searchsorted(below, drawn, right=True).clamp_(max=output.shape[-1] - 1)
    return p.neg_().scatter_add_(-1, labels, torch.ones(labels.shape)).to(output.dtype)


def gaussian_score(output: Tensor, generator: torch.Generator) -> Tensor:
    """The same for features: y ~ N(h, v) with v each feature's variance over the tokens."""
    variance = output.detach().float().flatten(0, -2).var(0, unbiased=False).clamp_min(1e-12)
    noise = torch.randn(output.shape, generator=generator)
    return (noise / variance.sqrt()).to(output.dtype)


@contextlib.contextmanager
def _watching(layers: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Within the context a pass there and back leaves the input and the output gradient of every layer in what is yielded."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda gradient: gradients.__setitem__(name, gradient.detach()))
        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield inputs, gradients
    finally:
        for handle in handles:
            handle.remove()


def fisher(stream: BlockStream, windows_NT: Tensor, workspace: Workspace, *, length: int, seed: int) -> None:
    """Backward through all blocks over the first `length` tokens of each window; `sweep` must have run.

    Files: fisher/K holds for each linear layer of call K "B|layer" ((O, O) or (O,)), "r|layer" its share for `shrunk`,
    "c|layer" (1,) its coupling, and "w|layer" (N, length) its positions' weights |g_t|. fisher/head holds B and its share of
    the head, where there is one.
    """
    windows_NT = windows_NT[:, :length]
    calls, answers = stream.calls(windows_NT), int(answering(windows_NT).sum()) / len(windows_NT)
    depth = len(calls)
    if not workspace.has(HEAD_FISHER):
        _head(stream, windows_NT, workspace, answers, seed, depth)
    reached = next(k for k in range(depth + 1) if workspace.has(gradient_file(k)))
    for k in track(range(reached - 1, -1, -1), "gather Fisher"):
        call = calls[k]
        hidden_NTd = workspace.load(hidden_file(k))["h"][:, :length]
        upper_NTd = workspace.load(gradient_file(k + 1))["g"]
        found: dict[str, Tensor] = {}
        lower = []
        sums, keys = moments(workspace, calls, call.block)
        factors, readers = {key: _factor(moment_II) for key, moment_II in sums.items()}, {key: n for n, key in keys.items()}
        with stream.block(call.block) as block:
            layers = linears(block)
            for part in batches(hidden_NTd):
                some = call.at(part)
                with _watching(layers) as (inputs, gradients):
                    entry = hidden_NTd[part].detach().requires_grad_(True)
                    with torch.enable_grad():
                        output = some.run(block, entry)
                        lower.append(torch.autograd.grad(output, entry, upper_NTd[part])[0])
                shared = _some(part, len(windows_NT), SHARED)
                white = {key: _white(factor, inputs[readers[key]][shared]) for key, factor in factors.items()}
                for name in layers:
                    g_NTO = gradients[name]
                    _add_fisher(found, f"B|{name}", g_NTO, shared)
                    _add_coupling(found, f"c|{name}", g_NTO[shared], white[keys[name]])
                    _append(found, f"w|{name}", torch.linalg.vector_norm(g_NTO.float(), dim=-1))
        _mean(found, len(windows_NT), answers)
        for name in layers:
            coupled, apart = found[f"c|{name}"]
            found[f"c|{name}"] = (coupled / (apart * factors[keys[name]].size).clamp_min(1e-300)).view(1)
        workspace.save(fisher_file(k), found)
        workspace.save(gradient_file(k), {"g": torch.cat(lower)})
        workspace.remove(gradient_file(k + 1))


def _head(stream: BlockStream, windows_NT: Tensor, workspace: Workspace, answers: float, seed: int, depth: int) -> None:
    """Gradient at the last hidden state, and the head's own Fisher, window by window."""
    hidden_NTd = workspace.load(hidden_file(depth))["h"][:, :windows_NT.shape[1]]
    answers_NT = answering(windows_NT)
    found: dict[str, Tensor] = {}
    gradients = []
    layer, logits = stream.model.get_output_embeddings(), list[Tensor]()
    hook: Any = contextlib.nullcontext() if layer is None else layer.register_forward_hook(
        lambda module, args, output: logits.append(output))
    with hook, stream.head() as head:
        for n in track(range(len(hidden_NTd)), "Fisher of the head"):
            part = slice(n, n + 1)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
            with torch.enable_grad():
                entry = hidden_NTd[part].detach().requires_grad_(True)
                output = head(entry[:, answers_NT[n]])
                upper = score(output, generator) if layer is not None else gaussian_score(output, generator)
                if layer is not None:
                    slope, = torch.autograd.grad(output, logits.pop(), torch.ones_like(output), retain_graph=True)
                    _add_label_fisher(found, output.detach().float().softmax(-1), slope.float(),
                                      _some(part, len(hidden_NTd), SHARED))
                gradients.append(torch.autograd.grad(output, entry, upper)[0])
    _mean(found, len(windows_NT), answers)
    workspace.save(gradient_file(depth), {"g": torch.cat(gradients)})
    workspace.save(HEAD_FISHER, found or {"none": torch.zeros(1)})


def shrunk(fisher: Tensor, share: float) -> Tensor:
    """(1 - r) B + r mean(diag B) I of B (O, O), or the same of its diagonal (O,)."""
    if fisher.ndim == 1:
        return (1 - share) * fisher + share * fisher.mean()
    result_OO = (1 - share) * fisher
    result_OO.diagonal().add_(share * fisher.diagonal().mean())
    return result_OO


def _some(part: slice, total: int, count: int) -> slice:
    """Of the windows `part` of `total` those that are among about `count` spread evenly over all; counted from its start."""
    stride = max(1, total // count)
    return slice(-part.start % stride, None, stride)


def _add_fisher(found: dict[str, Tensor], key: str, g_NTO: Tensor, shared: slice) -> None:
    """Sums over tokens of g g^T, or its diagonal, and under "norm|..." |sum_t g g^T|^2 of some sequences."""
    if diagonal := g_NTO.shape[-1] > FULL_FISHER:
        found[key] = found.get(key, 0) + g_NTO.flatten(0, -2).float().square().sum(0)
    else:
        accumulate(found, key, g_NTO.flatten(0, -2))
    for g_sTO in g_NTO[shared].float():
        form = g_sTO.square().sum(0) if diagonal else g_sTO @ g_sTO.T if len(g_sTO) < g_sTO.shape[1] else g_sTO.T @ g_sTO
        _append(found, f"norm|{key}", form.square().sum(dtype=torch.float64).view(1))


def _add_label_fisher(found: dict[str, Tensor], p_NTV: Tensor, slope_NTV: Tensor, shared: slice) -> None:
    """The same of the logits, whose gradients are a (y - p), without a draw: the mean over y is diag(a^2 p) - (a p) (a p)^T.
    Of a token that comes once in a million no draw would say that it comes at all. slope: a, 1 where no logit is capped."""
    def of(p_TV: Tensor, slope_TV: Tensor) -> Tensor:
        if p_TV.shape[-1] > FULL_FISHER:
            return (slope_TV.square() * (p_TV - p_TV.square())).sum(0)
        moved_TV = slope_TV * p_TV
        return (slope_TV * moved_TV).sum(0).diag() - moved_TV.T @ moved_TV

    found["B|head"] = found.get("B|head", 0) + of(p_NTV.flatten(0, -2), slope_NTV.flatten(0, -2))
    for p_TV, slope_TV in zip(p_NTV[shared], slope_NTV[shared], strict=True):
        _append(found, "norm|B|head", of(p_TV, slope_TV).square().sum(dtype=torch.float64).view(1))


@dataclass(frozen=True)
class _Factor:
    """L of S + ridge = L L^T, and tr(S (L L^T)^-1): the inputs' number of dimensions, less what the ridge takes."""

    lower_II: Tensor
    size: float


def _factor(moment_II: Tensor) -> _Factor:
    moment_II = moment_II.float()
    ridge = COUPLING_RIDGE * moment_II.diagonal().mean().clamp_min(1e-30)
    lower_II = torch.linalg.cholesky(moment_II + ridge * torch.eye(len(moment_II)))
    return _Factor(lower_II, len(moment_II) - float(ridge * torch.cholesky_inverse(lower_II).trace()))


def _white(factor: _Factor, x_STI: Tensor) -> Tensor:
    """L^-1 x of some sequences, (S, I, T)."""
    return torch.linalg.solve_triangular(factor.lower_II, x_STI.float().transpose(1, 2), upper=False)


def _add_coupling(found: dict[str, Tensor], key: str, g_STO: Tensor, white_SIT: Tensor) -> None:
    """Sums over sequences of |sum_t g_t x_t^T L^-T|^2 and of sum_t |g_t|^2, float64."""
    for g_TO, white_IT in zip(g_STO.float(), white_SIT, strict=True):
        coupled = ((g_TO @ g_TO.T) * (white_IT.T @ white_IT)).sum(dtype=torch.float64)
        found[key] = found.get(key, 0) + torch.stack([coupled, g_TO.square().sum(dtype=torch.float64)])


def _mean(found: dict[str, Tensor], sequences: int, length: float) -> None:
    """Sums over tokens become means, norms become shares. length: answers of a sequence."""
    for key in [key for key in found if key.startswith("B|")]:
        found[key] /= sequences * length
        if (norm := found.pop(f"norm|{key}", None)) is None:
            continue
        fisher = found[key].double()
        square, trace = fisher.square().sum(), fisher.sum() if fisher.ndim == 1 else fisher.diagonal().sum()
        noise = (norm.mean() / length ** 2 - square) / sequences
        found[key.replace("B|", "r|")] = (noise / (square - trace ** 2 / len(fisher)).clamp_min(1e-300)).clamp(0, 1).view(1)


def _append(found: dict[str, Tensor], key: str, value: Tensor) -> None:
    found[key] = torch.cat([found[key], value]) if key in found else value.clone()
