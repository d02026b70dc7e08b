"""The backward sweep against autograd of the whole model, and the KL that it predicts against the exact second order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.gather import price
from supremum.stats.fisher import _add_fisher, _mean, fisher, fisher_file, gaussian_score, gradient_file, score, shrunk
from supremum.stats.streaming import BlockStream, orientation
from supremum.stats.sweep import sweep
from supremum.workspace import Workspace
from tests.conftest import ENCODERS, FAMILIES

from .test_streaming import HEADLESS, windows

TinyModel = Callable[..., Path]
COUNT, LENGTH, SEED = 3, 100, 5


def random_changes(stream: BlockStream, scale: float = 0.01) -> dict[str, Tensor]:
    """A dW (O, I) for every matrix that can be compressed."""
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) * scale for name, (shape, _) in orientation(stream).items()}


def swept(stream: BlockStream, workspace: Workspace, windows_NT: Tensor, changes: dict[str, Tensor], length: int,
          seed: int = SEED) -> dict[str, Tensor]:
    """The files of a whole run: "block.layer" entries by tensor name, summed over the uses of a block."""
    sweep(stream, windows_NT, workspace)
    fisher(stream, windows_NT, workspace, lambda name: {"c": changes[name]}, length=length, seed=seed)
    found: dict[str, Tensor] = {}
    for k, call in enumerate(stream.calls(windows_NT)):
        for key, value in workspace.load(fisher_file(k)).items():
            kind, layer = key.split("|")[:2]
            entry = f"{kind}|{call.block}.{layer}.weight"
            found[entry] = found.get(entry, 0) + value
    for key, value in workspace.load("fisher/tables.safetensors").items():
        found["|".join(key.split("|")[:2])] = value
    return found


def whole_model(checkpoint: Checkpoint, windows_NT: Tensor, changes: dict[str, Tensor], turned: dict[str, bool],
                headless: bool) -> dict[str, Tensor]:
    """The same by one backward pass a window through the whole model, labels from the same generators."""
    model = checkpoint.model(torch.float32).requires_grad_(True)
    model.get_input_embeddings().padding_idx = None  # autograd would leave out the padding token's row
    parameters = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {f"v|{name}": [] for name in changes}
    outputs: dict[str, list[Tensor]] = {}
    for name in changes:
        module = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda m, args, out, name=name: outputs.setdefault(name, []).append(out))
    squares: dict[str, Tensor] = {}
    norms: dict[str, list[Tensor]] = {}
    for n in range(len(windows_NT)):
        outputs.clear()
        result = model(input_ids=windows_NT[n:n + 1])
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + n)
        output = result.last_hidden_state if headless else result.logits
        upper = (gaussian_score if headless else score)(output, generator)
        flat = [(name, out) for name, outs in outputs.items() for out in outs]
        names = list(changes)
        gradients = torch.autograd.grad(output, [parameters[name] for name in names] + [out for _, out in flat], upper)
        for name, gradient in zip(names, gradients, strict=False):
            gradient = gradient.T if turned[name] else gradient
            found[f"v|{name}"].append((gradient.double() * changes[name].double()).sum())
        for (name, _), g in zip(flat, gradients[len(names):], strict=True):
            g_TO = g.flatten(0, -2).double()
            squares[name] = squares.get(name, 0) + g_TO.T @ g_TO / windows_NT.numel()
            norms.setdefault(name, []).append(g_TO.norm(dim=1))
    once = {f"w|{name}": torch.stack(norm) for name, norm in norms.items()
            if len(norm) == len(windows_NT) and re.search(r"\.\d+\.", name)}  # of the blocks; each used once
    return {key: torch.stack(values) for key, values in found.items()} | {f"B|{n}": v for n, v in squares.items()} | once


def check(checkpoint: Checkpoint, tmp_path: Path, headless: bool = False) -> None:
    stream = BlockStream(checkpoint, dtype=torch.float32)
    changes = random_changes(stream)
    turned = {name: transposed for name, (_, transposed) in orientation(stream).items()}
    found = swept(stream, Workspace(tmp_path / "w", {}), windows(COUNT, LENGTH), changes, LENGTH)
    wanted = whole_model(checkpoint, windows(COUNT, LENGTH), changes, turned, headless)
    for key, value in wanted.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[key].double(), value, atol=2e-4 * scale, rtol=1e-3,
                                   msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_of_the_whole_models_gradients(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    """<G_s, dW> and B of every matrix: blocks, embedding and head, tied or not, used once or often."""
    check(open_checkpoint(tiny_model(family)), tmp_path)


@pytest.mark.parametrize("family", ENCODERS)
def test_products_of_headless_encoders(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    check(open_checkpoint(tiny_model(family, architecture=HEADLESS[family])), tmp_path, headless=True)


def test_some_sequences_price_the_candidates(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third window of nine, whatever the batches: the very products that all nine have there."""
    stream = BlockStream(open_checkpoint(tiny_model("llama")), dtype=torch.float32)
    changes, text = random_changes(stream), windows(9, 16)
    every = swept(stream, Workspace(tmp_path / "every", {}), text, changes, 16)
    monkeypatch.setattr("supremum.stats.fisher.PRICED", 3)
    monkeypatch.setattr("supremum.stats.sweep.BATCH_TOKENS", 32)  # two windows
    some = swept(stream, Workspace(tmp_path / "some", {}), text, changes, 16)
    for name in changes:
        torch.testing.assert_close(some[f"v|{name}"], every[f"v|{name}"][::3], atol=1e-5, rtol=1e-4)


def exact_second_order(model: nn.Module, changes: dict[str, Tensor], windows_NT: Tensor) -> Tensor:
    """1/2 Var_{v ~ p}[dz_v] (N, T) in float64, dz the logits' derivative along the change: KL to second order, exactly."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: changes[name].to(p) if name in changes else torch.zeros_like(p) for name, p in parameters.items()}
    model.set_attn_implementation("eager")  # type: ignore[operator]
    logits, dz = jvp(lambda p: functional_call(model, p, (), {"input_ids": windows_NT}).logits, (parameters,), (tangents,))
    p_NTV = logits.softmax(-1)
    return 0.5 * ((p_NTV * dz.square()).sum(-1) - (p_NTV * dz).sum(-1).square())


def true_kl(model: nn.Module, changes: dict[str, Tensor], windows_NT: Tensor) -> Tensor:
    with torch.no_grad():
        before = model(input_ids=windows_NT).logits.log_softmax(-1)
        for name, parameter in model.named_parameters():
            parameter.add_(changes.get(name, torch.zeros(())).to(parameter))
        after = model(input_ids=windows_NT).logits.log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


@pytest.mark.parametrize("part", ["all", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_the_prediction_is_the_exact_second_order(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  part: str) -> None:
    """Against a float64 derivative of the logits, within four standard errors of the sampled labels, and that one
    against the true KL of a small change. A sum over layers before squaring has the terms between layers."""
    checkpoint = open_checkpoint(tiny_model("qwen2"))
    stream = BlockStream(checkpoint, dtype=torch.float32)
    changes = {name: change for name, change in random_changes(stream, 1e-4).items() if part in ("all", name)}
    text = windows(256, 12).clamp_min(2)  # the padding token's row is zero, where the first norm is not smooth
    exact = exact_second_order(checkpoint.model(torch.float64), changes, text)
    true = true_kl(checkpoint.model(torch.float64), changes, text)
    assert float(true.mean()) == pytest.approx(float(exact.mean()), rel=0.02)

    monkeypatch.setattr("supremum.stats.fisher.PRICED", len(text))
    every = random_changes(stream, 1e-4)
    found = swept(stream, Workspace(tmp_path / "w", {}), text, every, 12)
    product_N = torch.stack([found[f"v|{name}"].double() for name in changes]).sum(0)
    error = float(0.5 * product_N.square().std() / len(text) ** 0.5 / 12)
    assert error < 0.15 * float(exact.mean())
    assert abs(price(product_N, 12) - float(exact.mean())) < 4 * error


def test_labels_are_sampled_from_the_model() -> None:
    """The score is one-hot(y) - p: mean zero and variance p (1 - p) at each logit, and autograd's of some log p(y)."""
    logits = torch.tensor([2.0, 0.5, -1.0]).repeat(1, 20_000, 1).requires_grad_(True)
    gradient = score(logits, torch.Generator().manual_seed(0))
    drawn = gradient.argmax(-1, keepdim=True)
    exact, = torch.autograd.grad(logits.log_softmax(-1).gather(-1, drawn).sum(), logits)
    torch.testing.assert_close(gradient, exact)
    p = logits.detach()[0, 0].softmax(-1)
    assert gradient[0].mean(0).abs().max() < 0.02
    torch.testing.assert_close(gradient[0].var(0), p * (1 - p), atol=0.01, rtol=0.0)


def test_a_resumed_fisher_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Killed after the upper block: what it left is used, and the labels are the same."""
    stream = BlockStream(open_checkpoint(tiny_model("llama")), dtype=torch.bfloat16)
    workspace, changes = Workspace(tmp_path / "w", {}), random_changes(stream)
    files = [fisher_file(0), fisher_file(1), gradient_file(0), "fisher/head.safetensors", "fisher/tables.safetensors"]

    def read() -> list[bytes]:
        return [workspace.path(file).read_bytes() for file in files]

    swept(stream, workspace, windows(), changes, LENGTH)
    whole = read()
    for file in files:
        workspace.remove(file)
    calls = 0

    def interrupted(name: str) -> dict[str, Tensor]:
        nonlocal calls
        calls += name.startswith("model.layers.0")
        if calls:
            raise KeyboardInterrupt
        return {"c": changes[name]}

    with pytest.raises(KeyboardInterrupt):
        fisher(stream, windows(), workspace, interrupted, length=LENGTH, seed=SEED)
    assert workspace.has(fisher_file(1)) and not workspace.has(fisher_file(0))
    swept(stream, workspace, windows(), changes, LENGTH)
    assert read() == whole


def test_large_outputs_keep_the_diagonal(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BlockStream(open_checkpoint(tiny_model("llama")), dtype=torch.float32)
    changes = random_changes(stream)
    whole = swept(stream, Workspace(tmp_path / "whole", {}), windows(), changes, LENGTH)
    monkeypatch.setattr("supremum.stats.fisher.FULL_FISHER", 100)
    short = swept(stream, Workspace(tmp_path / "short", {}), windows(), changes, LENGTH)
    for name, block_OO in whole.items():
        if name.startswith("B|") and len(block_OO) > 100:
            torch.testing.assert_close(short[name], block_OO.diagonal())


def clustered(sequences: int, length: int, size: int, seed: int) -> Tensor:
    """Gradients (N, T, O) with a wide spectrum, each sequence with a strength and a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, size)
    own = torch.randn(sequences, 1, size, generator=generator) * torch.randn(sequences, length, 1, generator=generator)
    strength = torch.randn(sequences, 1, 1, generator=generator).exp()
    return (torch.randn(sequences, length, size, generator=generator) + own) * strength * spread.sqrt()


@pytest.mark.parametrize(("length", "limit"), [(20, 4096), (60, 4096), (20, 8)])
def test_shrinkage_is_ledoit_and_wolfs(monkeypatch: pytest.MonkeyPatch, length: int, limit: int) -> None:
    """r = mean |B_s - B|^2 / N / |B - mean(diag) I|^2, straight from the definition; also of a diagonal."""
    monkeypatch.setattr("supremum.stats.fisher.FULL_FISHER", limit)
    g_NTO = clustered(12, length, 40, seed=0)
    found: dict[str, Tensor] = {}
    for part in g_NTO.split(5):
        _add_fisher(found, "B|x", part, slice(None))
    _mean(found, 12, length)
    each = torch.stack([g.double().T @ g.double() / length for g in g_NTO])
    if limit < 40:
        each = each.diagonal(dim1=1, dim2=2)
    mean = each.mean(0)
    target = mean.mean() if limit < 40 else mean.diagonal().mean() * torch.eye(40)
    share = (each - mean).square().flatten(1).sum(1).mean() / 12 / (mean - target).square().sum()
    torch.testing.assert_close(found["B|x"].double(), mean, atol=1e-5, rtol=1e-4)
    assert float(found["r|x"]) == pytest.approx(min(1.0, float(share)), rel=1e-3)
    torch.testing.assert_close(shrunk(found["B|x"], 0.25).double(), 0.75 * mean + 0.25 * target, atol=1e-5, rtol=1e-4)
    assert set(found) == {"B|x", "r|x"}


def test_shrinkage_helps_on_other_sequences() -> None:
    """What a code shaped by B^-1 does to new gradients, tr(B_new B^-1) |B|^(1/O) / O, is less with the shrunk B."""
    def fitted(seed: int) -> tuple[Tensor, float]:
        found: dict[str, Tensor] = {}
        _add_fisher(found, "B|x", clustered(16, 8, 64, seed), slice(None))
        _mean(found, 16, 8)
        return found["B|x"].double(), float(found["r|x"])

    new_OO, _ = fitted(seed=99)
    for seed in range(5):
        found_OO, share = fitted(seed)
        damage = [float(torch.linalg.solve(b, new_OO).diagonal().mean() * torch.linalg.slogdet(b)[1].div(64).exp())
                  for b in (found_OO, shrunk(found_OO, share))]
        assert damage[1] < damage[0]
