"""Second moments against hooks on the whole model, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supremum.checkpoint import open_checkpoint
from supremum.stats.streaming import BlockStream, linears
from supremum.stats.sweep import HEAD_MOMENTS, accumulate, batches, hidden_file, moments, moments_file, sweep
from supremum.workspace import Workspace
from tests.conftest import FAMILIES

from .test_streaming import windows

TinyModel = Callable[..., Path]


def whole_model_moments(model: torch.nn.Module, names: list[str], windows_NT: Tensor) -> dict[str, Tensor]:
    """E[x x^T] in float64 of each named linear layer; of a layer that is used often, the mean over its uses."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, name=name: seen[name].append(args[0].detach().flatten(0, -2).double())) for name in names]
    with torch.no_grad():
        model(input_ids=windows_NT)
    for handle in handles:
        handle.remove()
    return {name: torch.stack([x.T @ x / len(x) for x in xs]).mean(0) for name, xs in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_whole_model(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    stream, workspace = BlockStream(checkpoint, dtype=torch.float32), Workspace(tmp_path / "w", {})
    sweep(stream, windows(), workspace)
    names = [f"{name}.{inner}" for name, block in stream.blocks.items() for inner in linears(block)]
    wanted = whole_model_moments(checkpoint.model(torch.float32), names, windows())
    calls = stream.calls(windows())
    found = {}
    for block in stream.blocks:
        sums, keys = moments(workspace, calls, block)
        found |= {f"{block}.{layer}": sums[key] for layer, key in keys.items()}
    assert set(found) == set(names)
    for name in names:
        scale = float(wanted[name].diagonal().max())
        torch.testing.assert_close(found[name].double(), wanted[name], atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize(("family", "distinct", "layers"), [
    ("llama", 4, 7), ("gemma3", 4, 7), ("phi3", 4, 4), ("gpt2", 4, 4), ("bert", 4, 6), ("albert", 4, 6)])
def test_layers_with_one_input_share_one_moment(tiny_model: TinyModel, tmp_path: Path, family: str, distinct: int,
                                                layers: int) -> None:
    """q/k/v and gate/up read the same tensor; nothing else does."""
    stream = BlockStream(open_checkpoint(tiny_model(family)), dtype=torch.float32)
    workspace = Workspace(tmp_path / "w", {})
    sweep(stream, windows(), workspace)
    sums, keys = moments(workspace, stream.calls(windows()), next(iter(stream.blocks)))
    assert (len(sums), len(keys)) == (distinct, layers)


def test_a_resumed_sweep_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    stream = BlockStream(open_checkpoint(tiny_model("qwen2")), dtype=torch.float32)
    workspace = Workspace(tmp_path / "w", {})
    sweep(stream, windows(), workspace)
    files = [hidden_file(k) for k in range(3)] + [moments_file(k) for k in range(2)]
    whole = {file: workspace.path(file).read_bytes() for file in files}
    workspace.remove(hidden_file(2))  # killed in the second block, after its moments were written
    sweep(stream, windows(), workspace)
    assert {file: workspace.path(file).read_bytes() for file in files} == whole


def test_batches_cover_all_windows_once() -> None:
    for count, length in ((1, 8192), (7, 1024), (9, 2048), (33, 100)):
        covered = torch.cat([torch.arange(count)[part] for part in batches(torch.zeros(count, length))])
        assert covered.tolist() == list(range(count))


@pytest.mark.parametrize("size", [48, 256, 600])
def test_sums_of_products(size: int) -> None:
    """bfloat16 products are exact in float32 (two 8-bit significands), so only the summation rounds; x^T x is symmetric."""
    x_TI = torch.randn(400, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums: dict[str, Tensor] = {}
    for part in x_TI.split(100):
        accumulate(sums, "x", part)
    exact_II = x_TI.double().T @ x_TI.double()
    assert float((sums["x"].double() - exact_II).abs().max()) < 1e-6 * len(x_TI)
    assert torch.equal(sums["x"], sums["x"].T)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_moment_of_the_head(family: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Against the whole model's own run, where the head's input is caught."""
    checkpoint = open_checkpoint(tiny_model(family))
    workspace, tokens_NT = Workspace(tmp_path / "work", {}), windows()
    sweep(BlockStream(checkpoint, dtype=torch.float32), tokens_NT, workspace)
    model, caught = checkpoint.model(torch.float32), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: caught.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=tokens_NT)
    x_TI = torch.cat(caught)
    torch.testing.assert_close(workspace.load(HEAD_MOMENTS)["S"], x_TI.T @ x_TI / len(x_TI), rtol=1e-4, atol=1e-5)
