"""Encoder-decoders: the statistics of pairs against plain Transformers, pair by pair and without padding, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supremum.checkpoint import Checkpoint, open_checkpoint
from supremum.measure.streamed import final_hidden, replacing, streamed_quality, window_kl
from supremum.solve.residual import writers
from supremum.solve.walk import Walk
from supremum.stats.fisher import fisher, fisher_file, score
from supremum.stats.streaming import BlockStream, linears, orientation
from supremum.stats.sweep import HEAD_MOMENTS, moments, run_block, sweep, tokens
from supremum.text.pairs import EDGE, PADDING, answering, begin, count, inputs, join, written
from supremum.workspace import Workspace
from tests.conftest import PAIRS

from .test_fisher import of_tables

TinyModel = Callable[..., Path]
LENGTHS = ((9, 5), (4, 8), (12, 11), (7, 2))  # of sources, and of what is written


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supremum.stats.sweep.BATCH_TOKENS", 60)  # batches of two pairs


def texts(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Random sources, and what is written of them behind the start token 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(2, 384, (length,), generator=generator).tolist()

    return [(draw(read), [1, *draw(most), 1]) for read, most in LENGTHS]


def pairs(seed: int = 0) -> Tensor:
    sources, targets = zip(*texts(seed), strict=True)
    return join(sources, targets)


def alone(model: nn.Module, seed: int = 0) -> Iterator[tuple[Any, Tensor]]:
    """Each pair's output by itself, without padding, and its targets."""
    for source, target in texts(seed):
        output = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target[:-1]]))
        yield output, torch.tensor(target[1:])


def test_pairs_as_windows() -> None:
    windows_NT = pairs()
    assert windows_NT.shape == (4, 14 + 13)
    assert begin(windows_NT) != windows_NT.shape[1] - begin(windows_NT)  # the sides differ
    assert count(windows_NT) == sum(read + most + 2 for read, most in LENGTHS)
    for (source, target), window_T in zip(texts(), windows_NT, strict=True):
        assert written(window_T).tolist() == target
        assert [token for token in window_T[:begin(windows_NT)].tolist() if token >= 0] == source
    assert answering(windows_NT).sum(1).tolist() == [most + 1 for _, most in LENGTHS]
    assert set(windows_NT[windows_NT < 0].tolist()) == {PADDING, EDGE}
    one = torch.arange(6).view(2, 3)
    assert begin(one) == 0 and bool(answering(one).all()) and count(one) == 6 and inputs(one)["input_ids"] is one


@pytest.mark.parametrize("family", PAIRS)
def test_logits_are_those_of_each_pair_by_itself(tiny_model: TinyModel, family: str) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    stream, windows_NT = BlockStream(checkpoint, dtype=torch.float64), pairs()
    hidden_NTd = final_hidden(stream, windows_NT)
    with stream.head() as head, torch.no_grad():
        for n, (output, _) in enumerate(alone(checkpoint.model(torch.float64))):
            torch.testing.assert_close(head(hidden_NTd[n:n + 1, answering(windows_NT)[n]]), output.logits)
    assert all(p.is_meta for p in stream.model.parameters())


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """All inputs (tokens, I) of each linear layer."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, name=name: seen[name].append(args[0].detach().flatten(0, -2))) for name in names]
    with torch.no_grad():
        for _ in alone(model):
            pass
    for handle in handles:
        handle.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


@pytest.mark.parametrize("family", PAIRS)
def test_moments(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    """S of every layer, of the head too, and the number of tokens behind it: padding counts nowhere."""
    checkpoint = open_checkpoint(tiny_model(family))
    stream, workspace = BlockStream(checkpoint, dtype=torch.float64), Workspace(tmp_path / "w", {})
    sweep(stream, pairs(), workspace)
    names = [f"{name}.{inner}" for name, block in stream.blocks.items() for inner in linears(block)]
    wanted = inputs_of(checkpoint.model(torch.float64), [*names, "lm_head"])
    calls, found = stream.calls(pairs()), {}
    for block in stream.blocks:
        sums, keys = moments(workspace, calls, block)
        seen = tokens(workspace, calls, block)
        found |= {f"{block}.{layer}": (sums[key], seen[key]) for layer, key in keys.items()}
    found["lm_head"] = workspace.load(HEAD_MOMENTS)["S"], int(answering(pairs()).sum())
    assert set(found) == set(wanted)
    for name, x_TI in wanted.items():
        moment_II, seen_tokens = found[name]
        assert seen_tokens == len(x_TI)
        torch.testing.assert_close(moment_II.double(), x_TI.T @ x_TI / len(x_TI), atol=1e-5, rtol=1e-5)


def random_changes(stream: BlockStream) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) * 0.01 for name, (shape, _) in orientation(stream).items()}


def whole_model(checkpoint: Checkpoint, changes: dict[str, Tensor], tables: list[str]) -> dict[str, Tensor]:
    """B, |g_t| and <G_s, dE> of the tables by one backward pass a pair, without padding; labels from the same generators."""
    model = checkpoint.model(torch.float64).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    parameters = dict(model.named_parameters())
    outputs: dict[str, Tensor] = {}
    inner = [name for name in changes if not isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Embedding)]
    for name in inner:
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out}))
    found: dict[str, list[Tensor]] = {}
    answers = 0
    for n, (output, targets) in enumerate(alone(model)):
        answers += len(targets)
        upper = score(output.logits, torch.Generator().manual_seed(5 * 1_000_003 + n))
        gradients = torch.autograd.grad(output.logits, [*(parameters[name] for name in tables),
                                                        *(outputs[name] for name in inner)], upper)
        for name, gradient in zip(tables, gradients, strict=False):
            found.setdefault(f"v|{name}", []).append((gradient * changes[name]).sum())
        for name, g_1TO in zip(inner, gradients[len(tables):], strict=True):
            found.setdefault(f"B|{name}", []).append(g_1TO[0].T @ g_1TO[0])
            found.setdefault(f"w|{name}", []).append(g_1TO[0].norm(dim=1))
    return {key: torch.cat(values) if key[0] == "w" else torch.stack(values) if key[0] == "v"
            else torch.stack(values).sum(0) / answers for key, values in found.items()}


@pytest.mark.parametrize("family", PAIRS)
def test_the_backward_sweep(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    """B and |g_t|, zero where there is padding, and the gradients at the embedding and the head."""
    checkpoint = open_checkpoint(tiny_model(family))
    stream, workspace, windows_NT = BlockStream(checkpoint, dtype=torch.float64), Workspace(tmp_path / "w", {}), pairs()
    changes = random_changes(stream)
    wanted = whole_model(checkpoint, changes, stream.tables())
    sweep(stream, windows_NT, workspace)
    fisher(stream, windows_NT, workspace, length=windows_NT.shape[1], seed=5)
    found: dict[str, Tensor] = {}
    for k, call in enumerate(stream.calls(windows_NT)):
        for key, value in workspace.load(fisher_file(k)).items():
            kind, layer = key.split("|")[:2]
            found[f"{kind}|{call.block}.{layer}.weight"] = value
    found |= of_tables(stream, workspace, windows_NT, changes, seed=5)
    start = begin(windows_NT)
    for key, value in wanted.items():
        scale = float(value.abs().max())
        if key.startswith("w|"):
            w_NT = found[key]
            real_NT = windows_NT[:, :start] >= 0 if w_NT.shape[1] == start else answering(windows_NT)[:, start:]
            assert float(w_NT[~real_NT].abs().max()) == 0
            torch.testing.assert_close(w_NT[real_NT].double(), value, atol=1e-5 * scale, rtol=1e-5, msg=key)
        elif key in found:
            torch.testing.assert_close(found[key].double(), value, atol=1e-5 * scale, rtol=1e-4, msg=key)
    assert {key for key in wanted if key[0] == "v"} <= set(found)


@pytest.mark.parametrize("family", PAIRS)
def test_quality_is_that_of_transformers(tiny_model: TinyModel, family: str) -> None:
    """KL and perplexity over the written tokens of pairs of different lengths."""
    checkpoint = open_checkpoint(tiny_model(family))
    stream, windows_NT = BlockStream(checkpoint, dtype=torch.float64), pairs()
    model, changes = checkpoint.model(torch.float64), random_changes(stream)
    with torch.no_grad():
        before = [output.logits[0].log_softmax(-1) for output, _ in alone(model)]
        for name, change in changes.items():
            model.get_parameter(name).add_(change)
        after = [(output.logits[0].log_softmax(-1), targets) for output, targets in alone(model)]
    kl = [(p.exp() * (p - q)).sum(-1) for p, (q, _) in zip(before, after, strict=True)]
    nll = torch.cat([-q.gather(1, targets[:, None]) for q, targets in after])
    reference_NTd = final_hidden(stream, windows_NT)

    def changed(name: str) -> Tensor | None:
        return checkpoint.read(name) + changes[name] if name in changes else None

    found = streamed_quality(stream, windows_NT, reference_NTd, changed)
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5) and found.tokens == len(nll)
    with replacing(stream, changed), torch.no_grad():
        own = window_kl(stream, windows_NT, reference_NTd, final_hidden(stream, windows_NT))
    assert float(own.mean()) == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)


@pytest.mark.parametrize("family", PAIRS)
def test_padding_changes_nothing(tiny_model: TinyModel, family: str) -> None:
    stream, windows_NT = BlockStream(open_checkpoint(tiny_model(family)), dtype=torch.float64), pairs()
    start = begin(windows_NT)
    fill = torch.full((len(windows_NT), 5), PADDING)
    wider_NT = torch.cat([fill[:, :3], windows_NT[:, :start], windows_NT[:, start:], fill], 1)
    wider_NT[:, :start + 3] = torch.cat([windows_NT[:, :start - 1], fill[:, :3], windows_NT[:, start - 1:start]], 1)
    one_NTd, other_NTd = final_hidden(stream, windows_NT), final_hidden(stream, wider_NT)
    torch.testing.assert_close(one_NTd[answering(windows_NT)], other_NTd[answering(wider_NT)])


@pytest.mark.parametrize("family", PAIRS)
def test_walks_through_both_sides(tiny_model: TinyModel, family: str) -> None:
    """Every layer is held once on what it reads, writers into either side's stream are found, and the state is as ever."""
    stream, windows_NT = BlockStream(open_checkpoint(tiny_model(family)), dtype=torch.float64), pairs()
    hidden_NTd = stream.embed(windows_NT)
    for call in stream.calls(windows_NT):
        with stream.block(call.block) as block:
            places = writers(block, call.at(slice(0, 1)), hidden_NTd[:1])
            decoder = "decoder" in call.block
            itself, other, last = ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o",
                                   f"layer.{1 + decoder}.DenseReluDense.wo") if family == "t5" else \
                ("self_attn.out_proj", "encoder_attn.out_proj", "fc2")
            assert set(places) == {itself, last} | ({other} if decoder else set())
            walk, after_NTd = Walk(block, call, hidden_NTd, list(linears(block)), places), run_block(block, call, hidden_NTd)
            assert [key for key, _ in walk]
            torch.testing.assert_close(walk.output, after_NTd)
            hidden_NTd = after_NTd
