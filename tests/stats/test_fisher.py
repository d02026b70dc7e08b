"""The backward sweep against autograd of the whole model."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.stats.fisher import (
    HEAD_FISHER,
    _add_fisher,
    _mean,
    fisher,
    fisher_file,
    gaussian_score,
    gradient_file,
    score,
    shrunk,
)
from supremum.stats.streaming import BlockStream, linears, orientation
from supremum.stats.sweep import hidden_file, moments, sweep
from supremum.text.pairs import answering
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
    fisher(stream, windows_NT, workspace, length=length, seed=seed)
    found: dict[str, Tensor] = {}
    for k, call in enumerate(stream.calls(windows_NT)):
        for key, value in workspace.load(fisher_file(k)).items():
            kind, layer = key.split("|")[:2]
            entry = f"{kind}|{call.block}.{layer}.weight"
            found[entry] = found.get(entry, 0) + value
    return found | of_tables(stream, workspace, windows_NT[:, :length], changes, seed)


def of_tables(stream: BlockStream, workspace: Workspace, windows_NT: Tensor, changes: dict[str, Tensor], seed: int,
              ) -> dict[str, Tensor]:
    """<G_s, dE> of the embedding from the gradient at its rows, and of the head from that of its logits; the head's B."""
    embedding, head = stream.table_names()
    rows_NTe = stream.embedding_gradient(windows_NT, workspace.load(gradient_file(0))["g"])
    found = {f"v|{embedding}": (rows_NTe * changes[embedding][windows_NT.clamp(min=0)]).sum((1, 2))}
    if head is None:
        return found
    hidden_NTd, answers_NT = workspace.load(hidden_file(len(stream.calls(windows_NT))))["h"], answering(windows_NT)
    products = []
    layer, seen = stream.model.get_output_embeddings(), []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with stream.head() as top, torch.enable_grad():
        for n, hidden_Td in enumerate(hidden_NTd):
            output = top(hidden_Td[None, :windows_NT.shape[1]][:, answers_NT[n]].requires_grad_(True))
            upper = score(output, torch.Generator().manual_seed(seed * 1_000_003 + n))
            x_1TI, logits_1TO = seen[-1]
            g_1TO, = torch.autograd.grad(output, logits_1TO, upper)
            products.append((g_1TO * (x_1TI.detach() @ changes[head].to(g_1TO).T)).sum())
    handle.remove()
    found[f"v|{head}"] = found.get(f"v|{head}", 0) + torch.stack(products)
    return found | {f"B|{head}": workspace.load(HEAD_FISHER)["B|head"]}


def whole_model(checkpoint: Checkpoint, windows_NT: Tensor, changes: dict[str, Tensor], headless: bool) -> dict[str, Tensor]:
    """The same by one backward pass a window through the whole model, labels from the same generators."""
    model = checkpoint.model(torch.float32).requires_grad_(True)
    model.get_input_embeddings().padding_idx = None  # autograd would leave out the padding token's row
    parameters = dict(model.named_parameters())
    tables = [name for name in changes if not re.search(r"\.\d+\.", name)]
    head = None if headless else BlockStream(checkpoint, dtype=torch.float32).table_names()[1]
    found: dict[str, list[Tensor]] = {f"v|{name}": [] for name in tables}
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
        gradients = torch.autograd.grad(output, [parameters[name] for name in tables] + [out for _, out in flat], upper)
        for name, gradient in zip(tables, gradients, strict=False):
            found[f"v|{name}"].append((gradient.double() * changes[name].double()).sum())
        for (name, logits), g in zip(flat, gradients[len(tables):], strict=True):
            g_TO = g.flatten(0, -2).double()
            square_OO = of_labels(output, logits) if name == head else g_TO.T @ g_TO
            squares[name] = squares.get(name, 0) + square_OO / windows_NT.numel()
            norms.setdefault(name, []).append(g_TO.norm(dim=1))
    once = {f"w|{name}": torch.stack(norm) for name, norm in norms.items()
            if len(norm) == len(windows_NT) and re.search(r"\.\d+\.", name)}  # of the blocks; each used once
    return {key: torch.stack(values) for key, values in found.items()} | {f"B|{n}": v for n, v in squares.items()} | once


def of_labels(output: Tensor, logits: Tensor) -> Tensor:
    """Sum over positions of E_y[g g^T], g = d log p(y) / d logits, label by label, float64."""
    p_TV = output.detach().double().softmax(-1).flatten(0, -2)
    slope, = torch.autograd.grad(output, logits, torch.ones_like(output), retain_graph=True)
    total_VV = torch.zeros(p_TV.shape[1], p_TV.shape[1], dtype=torch.float64)
    for p_V, slope_V in zip(p_TV, slope.flatten(0, -2).double(), strict=True):
        g_yV = (torch.eye(len(p_V), dtype=torch.float64) - p_V) * slope_V
        total_VV += g_yV.T @ (p_V[:, None] * g_yV)
    return total_VV


def check(checkpoint: Checkpoint, tmp_path: Path, headless: bool = False) -> None:
    stream = BlockStream(checkpoint, dtype=torch.float32)
    changes = random_changes(stream)
    found = swept(stream, Workspace(tmp_path / "w", {}), windows(COUNT, LENGTH), changes, LENGTH)
    wanted = whole_model(checkpoint, windows(COUNT, LENGTH), changes, headless)
    for key, value in wanted.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[key].double(), value, atol=2e-4 * scale, rtol=1e-3,
                                   msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sweep_is_one_pass_through_the_whole_model(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    """B and |g_t| of every layer, used once or often, B of the head, and the gradients at the embedding, tied or not."""
    check(open_checkpoint(tiny_model(family)), tmp_path)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_sweep_of_headless_encoders(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    check(open_checkpoint(tiny_model(family, architecture=HEADLESS[family])), tmp_path, headless=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "albert"])
def test_coupling_is_what_whitened_weight_gradients_cost_over_kfac(tiny_model: TinyModel, tmp_path: Path, family: str,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """|G_s L^-T|^2 of weight gradients by autograd, call by call, over |g_t|^2 tr(S S^-1); every second of six sequences."""
    monkeypatch.setattr("supremum.stats.fisher.SHARED", 3)
    monkeypatch.setattr("supremum.stats.sweep.BATCH_TOKENS", 2 * LENGTH)
    stream, workspace, text = BlockStream(open_checkpoint(tiny_model(family)), dtype=torch.float32), \
        Workspace(tmp_path / "w", {}), windows(6, LENGTH)
    sweep(stream, text, workspace)
    fisher(stream, text, workspace, length=LENGTH, seed=SEED)
    calls = stream.calls(text)
    upper_NTd = workspace.load(gradient_file(0))["g"]  # any gradients do: they stand for those of call 0's output
    monkeypatch.setattr("supremum.stats.fisher._head", lambda *given: None)
    workspace.remove(gradient_file(0))
    workspace.remove(fisher_file(0))
    workspace.save(gradient_file(1), {"g": upper_NTd})
    fisher(stream, text, workspace, length=LENGTH, seed=SEED)
    found, entry_NTd = workspace.load(fisher_file(0)), workspace.load(hidden_file(0))["h"]
    sums, keys = moments(workspace, calls, calls[0].block)
    with stream.block(calls[0].block) as block:
        for name, layer in linears(block).items():
            layer.weight.requires_grad_(True)
            moment_II = sums[keys[name]].double()
            ridged_II = moment_II + 0.01 * moment_II.diagonal().mean() * torch.eye(len(moment_II))
            size = float(torch.linalg.solve(ridged_II, moment_II).trace())
            coupled = apart = 0.0
            for n in (0, 2, 4):
                outputs: list[Tensor] = []
                handle = layer.register_forward_hook(lambda m, args, out, outputs=outputs: outputs.append(out))
                with torch.enable_grad():
                    result = calls[0].at(slice(n, n + 1)).run(block, entry_NTd[n:n + 1])
                handle.remove()
                g_1TO, gradient = torch.autograd.grad(result, [outputs[0], layer.weight], upper_NTd[n:n + 1])
                gradient_OI = (gradient.T if family == "gpt2" else gradient).double()
                coupled += float((gradient_OI @ torch.linalg.inv(ridged_II) * gradient_OI).sum())
                apart += float(g_1TO.double().square().sum())
            layer.weight.requires_grad_(False)
            assert float(found[f"c|{name}"]) == pytest.approx(coupled / (apart * size), rel=1e-3), name


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


def test_a_resumed_fisher_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the upper block: what it left is used, and the labels are the same."""
    stream = BlockStream(open_checkpoint(tiny_model("llama")), dtype=torch.bfloat16)
    workspace, changes = Workspace(tmp_path / "w", {}), random_changes(stream)
    files = [fisher_file(0), fisher_file(1), gradient_file(0), HEAD_FISHER]

    def read() -> list[bytes]:
        return [workspace.path(file).read_bytes() for file in files]

    swept(stream, workspace, windows(), changes, LENGTH)
    whole = read()
    for file in files:
        workspace.remove(file)
    block = stream.block

    def interrupted(name: str) -> AbstractContextManager[nn.Module]:
        if name == "model.layers.0":
            raise KeyboardInterrupt
        return block(name)

    monkeypatch.setattr(stream, "block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fisher(stream, windows(), workspace, length=LENGTH, seed=SEED)
    monkeypatch.undo()
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
