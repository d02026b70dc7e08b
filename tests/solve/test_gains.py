"""The global stage: its gradient against autograd of the whole model, what formats store of it, and when it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import LazyCoded
from supremum.codecs import Coded
from supremum.codecs.lattice import Frame, Lattice
from supremum.measure.streamed import final_hidden, replacing
from supremum.solve import gains, nearest
from supremum.solve.gains import _gradient, _heads, _numbers, scaled, takes_factors, train_gains
from supremum.stats.streaming import BlockStream, orientation
from supremum.stats.sweep import sweep
from supremum.text.pairs import answering
from supremum.workspace import Workspace

from ..stats.test_streaming import windows

TinyModel = Callable[..., Path]


def rounded(stream: BlockStream, codec: str) -> LazyCoded:
    """Every matrix of the blocks by nearest rounding, decoded in (O, I)."""
    turned = {name: swap for name, (_, swap) in orientation(stream).items()}
    names = [name for name in turned if name not in stream.tables()]

    def code(name: str) -> Coded:
        weight = stream.checkpoint.read(name).float()
        return nearest(weight.T.contiguous() if turned[name] else weight, codecs.get(codec))

    made = {name: code(name) for name in names}
    return LazyCoded(dict.fromkeys(names, codec), made.__getitem__)


def whole_gradient(stream: BlockStream, coded: LazyCoded, theta_P: Tensor, places: Mapping[str, slice], windows_NT: Tensor,
                   ) -> Tensor:
    """By autograd through Transformers' own model, theta built into its parameters."""
    original, model = (stream.checkpoint.model(torch.float32).requires_grad_(False) for _ in range(2))
    turned = {name: swap for name, (_, swap) in orientation(stream).items()}
    theta = theta_P.clone().requires_grad_(True)
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in coded:
            factor_O1 = 1 + theta[places[name]][:, None] if name in places else torch.ones(())
            value = coded[name].decode() * factor_O1
            values[name] = value.T if turned[name] else value
        elif name in places:
            values[name] = parameter + parameter.square().mean().sqrt() * theta[places[name]]
    p, q = original(input_ids=windows_NT), functional_call(model, values, (), {"input_ids": windows_NT})
    if "logits" in p:
        logp, logq = p.logits.log_softmax(-1), q.logits.log_softmax(-1)
        loss = (logp.exp() * (logp - logq)).sum(-1).mean()
    else:
        p_NTD, q_NTD = p.last_hidden_state, q.last_hidden_state
        loss = torch.stack([((a - b).square() / a.var(0, unbiased=False)).sum(-1).mean() / 2
                            for a, b in zip(p_NTD, q_NTD, strict=True)]).mean()
    return torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize(("family", "architecture"), [("llama", None), ("qwen2", None), ("gpt2", None), ("gemma3", None),
                                                      ("bert", None), ("albert", None), ("bert", "BertModel")])
def test_gradient_is_that_of_the_whole_model(family: str, architecture: str | None, tiny_model: TinyModel) -> None:
    stream = BlockStream(open_checkpoint(tiny_model(family, architecture=architecture)), dtype=torch.float32)
    windows_NT = windows(3, 20)
    coded = rounded(stream, "int3-g64")
    numbers = _numbers(stream, coded)
    assert set(coded.plan) <= set(numbers.places) and len(numbers.vectors) > 3
    theta_P = 0.05 * torch.randn(numbers.count, generator=torch.Generator().manual_seed(1))
    goal_NTd, calls = final_hidden(stream, windows_NT), stream.calls(windows_NT)
    with replacing(stream, lambda name: coded[name].decode() if name in coded else None):
        entry_NTd = stream.embed(windows_NT)
        with _heads(stream) as divergence:
            found_P = _gradient(stream, calls, numbers, theta_P, entry_NTd, goal_NTd, answering(windows_NT),
                                divergence)
    expected_P = whole_gradient(stream, coded, theta_P, numbers.places, windows_NT)
    torch.testing.assert_close(found_P, expected_P, rtol=1e-3, atol=1e-3 * float(expected_P.abs().max()))
    assert float(expected_P.norm()) > 0


@pytest.mark.parametrize(("codec", "takes"), [
    ("int3-g64", True), ("uint4-g32", True), ("int8-channel", True), ("ternary-g64", True), ("gptq4-g64", True),
    ("Q4_0", True), ("Q4_1", True), ("IQ2_XXS", True), ("IQ1_S", True),
    ("fp8-channel", True), ("mxfp4-g32", False), ("mxfp8-g32", False), ("fp8-b128", False)])
def test_rows_are_scaled_where_the_format_can(codec: str, takes: bool) -> None:
    weight_OI = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    coded = nearest(weight_OI, codecs.get(codec))
    assert takes_factors(coded) == takes
    if takes:
        factor_O = 1 + 0.1 * torch.rand(256, generator=torch.Generator().manual_seed(1))
        found_OI, wish_OI = scaled(coded, factor_O).decode(), coded.decode() * factor_O[:, None]
        assert (found_OI - wish_OI).norm() < 0.005 * wish_OI.norm()
        assert torch.equal(scaled(coded, torch.full((256,), 2.0)).decode(), 2 * coded.decode())


def test_a_lattice_takes_none() -> None:
    assert not takes_factors(Lattice(torch.ones(2, 2, dtype=torch.int16), Frame(*(torch.zeros(2, dtype=torch.int16),) * 4)))


@dataclass(frozen=True)
class Small:
    """A tiny model of 3 bits after the sweep."""

    stream: BlockStream
    windows: Tensor
    workspace: Workspace
    coded: LazyCoded

    def train(self, folder: str = "x") -> gains.Trained:
        return train_gains(self.stream, self.windows, self.windows, final_hidden(self.stream, self.windows), self.workspace,
                           self.coded, folder)


@pytest.fixture
def small(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Small]:
    stream = BlockStream(open_checkpoint(tiny_model("llama")), dtype=torch.float32)
    workspace, windows_NT = Workspace(tmp_path / "work", {}), windows(6, 64)
    sweep(stream, windows_NT, workspace)
    yield Small(stream, windows_NT, workspace, rounded(stream, "int3-g64"))
    workspace.close()


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the measurements say, one after the other."""
    def say(*kl: float) -> None:
        left = iter(kl)
        monkeypatch.setattr(gains, "streamed_quality", lambda *_: SimpleNamespace(to_dict=lambda: {"kl_mean": next(left)}))

    return say


def test_training_lowers_the_kl_of_what_is_stored(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured through Transformers' own model, not through the stream that trained it."""
    monkeypatch.setattr(gains, "TOKENS", 64)
    monkeypatch.setattr(gains, "RATE", 1e-2)
    found = small.train()
    model, original = (small.stream.checkpoint.model(torch.float32) for _ in range(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found.vectors:
                parameter.copy_(found.vectors[name])
            elif name in found.coded:
                parameter.copy_(found.coded[name].decode())
        p, q = (m(input_ids=small.windows).logits[:, :-1].log_softmax(-1) for m in (original, model))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.record is not None
    assert kl == pytest.approx(found.quality["kl_mean"], rel=1e-4) and kl < 0.9 * found.record["kl_before"]
    assert found.record["kl_after"] == found.quality["kl_mean"] and len(found.record["passes"]) >= 2
    assert found.coded.plan == small.coded.plan
    assert any(not torch.equal(found.coded[name].decode(), small.coded[name].decode()) for name in small.coded)


@pytest.mark.parametrize("after", [1.0, 1.5])
def test_what_does_not_help_is_not_kept(small: Small, measures: Callable[..., None], after: float) -> None:
    measures(1.0, after)
    found = small.train()
    assert found.vectors == {} and found.coded is small.coded and found.quality == {"kl_mean": 1.0}
    assert found.record is not None and [one["kl"] for one in found.record["passes"]] == [after]


@pytest.mark.parametrize(("said", "kept"), [([0.8, 0.79, 0.1], 0.79), ([0.8, 0.5, 0.4, 0.1], 0.4), ([0.8, 0.9], 0.8)])
def test_passes_follow_while_they_buy_enough(small: Small, measures: Callable[..., None], said: list[float],
                                             kept: float) -> None:
    measures(1.0, *said)
    found = small.train()
    assert found.record is not None and found.quality["kl_mean"] == found.record["kl_after"] == kept
    assert len(found.record["passes"]) == (3 if said[1] == 0.5 else 2)


def test_what_is_near_enough_is_left_alone(small: Small, measures: Callable[..., None]) -> None:
    measures(0.99 * gains.WORTH)
    found = small.train()
    assert found == gains.Trained(small.coded, {}, {"kl_mean": 0.99 * gains.WORTH}, None)


def test_a_killed_pass_goes_on_to_the_bit(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gains, "TOKENS", 64)
    monkeypatch.setattr(gains, "PASSES", 2)
    monkeypatch.setattr(gains, "LEAST", 0.0)
    whole = small.train("whole")
    assert whole.vectors and whole.record is not None and len(whole.record["passes"]) == 2
    real, count = gains._gradient, 0

    def stopping(*arguments: Any) -> Tensor:
        nonlocal count
        if (count := count + 1) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(gains, "_gradient", stopping)
    with pytest.raises(KeyboardInterrupt):
        small.train("killed")
    assert int(small.workspace.load("killed/gains/0.safetensors")["steps"]) == 3
    again = small.train("killed")
    assert count == 4 + 12 - 3 and again.quality == whole.quality
    assert all(torch.equal(again.vectors[name], value) for name, value in whole.vectors.items())
