"""Smoothing keeps the function, folds only what can be folded, and lowers the error of rounded inputs."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from supremum import codecs, open_checkpoint
from supremum.codecs.activations import round_inputs, rounder
from supremum.gap import gap_of
from supremum.gather import gather, gather_fisher
from supremum.solve.cancellation import nearest
from supremum.solve.smoothing import Pair, choose, factors_of, find_pairs, output_error, smoothed
from supremum.stats.calls import Call
from supremum.stats.streaming import BlockStream, orientation
from supremum.workspace import Workspace

CODEC = "int8-channel-a8"


def fold(folder, work):
    """(original, folded, record) of a tiny model on random tokens."""
    checkpoint = open_checkpoint(folder)
    stream = BlockStream(checkpoint, dtype=torch.float32)
    menu = {name: [CODEC] for name in orientation(stream) if name not in stream.tables()}
    tokens_NT = torch.randint(2, 384, (4, 32), generator=torch.Generator().manual_seed(1))
    view, record = smoothed(stream, tokens_NT, menu, Workspace(work, {}))
    return checkpoint, view, record, tokens_NT


@pytest.mark.parametrize(("family", "producers"), [
    ("llama", {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"}),
    ("qwen2", {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"}),  # v_proj has a bias
    ("gemma3", {"input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"}),  # gain 1 + weight
    ("bert", {"value"}),  # its norms are read by the residual stream too, its GELU is not homogeneous
])  # fmt: skip
def test_the_function_stays(tiny_model, tmp_path, family, producers):
    original, view, record, tokens_NT = fold(tiny_model(family), tmp_path / "work")
    assert {pair["producer"].split(".")[-1] for pair in record["pairs"]} == producers
    assert len(record["pairs"]) == 2 * len(producers) and len(record["not_folded"]) == 2 * (4 - len(producers))
    assert all(pair["error_after"] <= pair["error_before"] for pair in record["pairs"])
    changed = [pair for pair in record["pairs"] if pair["exponent"] is not None]
    assert changed
    for pair in changed:
        for reader in pair["readers"]:
            assert not torch.equal(view.read(f"{reader}.weight"), original.read(f"{reader}.weight"))
    one, other = (checkpoint.model(torch.float64)(input_ids=tokens_NT).logits for checkpoint in (original, view))
    assert (one - other).abs().max() < 3e-6 * one.abs().max()  # weights are handed on in float32
    norms = [name for pair in changed if (name := f"{pair['producer']}.weight") in view.tensors and view.read(name).ndim == 1]
    for name in norms:  # nothing is lost where they are stored
        assert torch.equal(view.read(name), view.read(name).bfloat16().float())


def test_a_smoothed_file_is_not_compared_layer_by_layer(tiny_model, tmp_path):
    original, view, _, _ = fold(tiny_model("llama", num_hidden_layers=1), tmp_path / "work")
    (tmp_path / "a.txt").write_text("\n\n".join(f"The river moves {n * n} stones past bridge {n}." for n in range(2000)))
    gathered = gather(original, Workspace(tmp_path / "gap", {}), text=[str(tmp_path / "a.txt")], tokens=1024, seed=0,
                      dtype="float32")
    gather_fisher(gathered, 0)
    found = gap_of(gathered, view)
    assert "smoothed" in found.remark and not found.layers and found.gap == pytest.approx(found.bits - found.least_bits)


def test_factors_by_hand():
    """x 8 and 2, w 2 and 2, a = 1/2: s in proportion to 2 and 1, of geometric mean 1: sqrt 2 and 1 / sqrt 2."""
    found = factors_of(torch.tensor([8.0, 2.0]).double(), torch.tensor([2.0, 2.0]).double(), 0.5)
    assert found.tolist() == pytest.approx([2**0.5, 2**-0.5])
    dead = factors_of(torch.tensor([8.0, 0.0, 2.0]).double(), torch.tensor([2.0, 5.0, 2.0]).double(), 0.5)
    assert dead.tolist() == pytest.approx([2**0.5, 1.0, 2**-0.5])


def test_heads_that_share_a_value_share_a_factor():
    """2 heads of values with 2 channels, 4 heads of queries: those of one group take the larger size and one factor."""
    pair = Pair("v", ("o",), None, head=2)
    assert pair.widen(torch.tensor([1.0, 2, 3, 4]), 8).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert pair.narrow(torch.tensor([1.0, 9, 5, 2, 3, 4, 0, 7]), 4).tolist() == [5, 9, 3, 7]


class Block(nn.Module):
    def __init__(self, other: str) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.other = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), other

    def forward(self, x_NTd):
        seen = self.norm(x_NTd)
        inner = self.two(nn.functional.relu(self.one(seen)))
        return x_NTd + inner + {"reads": 1e-3 * seen, "": 0}[self.other]


@pytest.mark.parametrize(("other", "producers"), [("", ["norm", "one"]), ("reads", ["one"])])
def test_a_norm_with_another_reader_is_refused(other, producers):
    """Relu lets positive factors through: two reads what one makes. The norm stands only if nothing else reads it."""
    torch.manual_seed(0)
    found = find_pairs(Block(other), Call("block", (), {}), torch.randn(1, 8, 16), ["norm", "one", "two"],
                       [["one"], ["two"]], 4)
    assert [pair.producer for pair in found] == producers


def test_known_pairs_are_checked_again():
    torch.manual_seed(0)
    arguments = (Call("block", (), {}), torch.randn(1, 8, 16), ["norm", "one", "two"], [["one"], ["two"]], 4)
    known = find_pairs(Block(""), *arguments)
    assert find_pairs(Block(""), *arguments, known) == known
    assert [pair.producer for pair in find_pairs(Block("reads"), *arguments, known)] == ["one"]


def test_planted_outliers_cost_what_theory_says():
    """One input of 256 is always 100 or -100, the others N(0, 1). Divided by s it sets a token's step, 100 / s / 127.5: each
    of the others errs by step^2 / 12, it by half a step (127.5 has no code), and s times that where it is multiplied back:

        E = (255 + 3 s^2) step^2 / 12        s = 10 for 1: 45 times less
    """
    torch.manual_seed(0)
    x_TI, weight_OI, apply = torch.randn(1024, 256), torch.randn(256, 256), rounder(CODEC)
    assert apply is not None
    x_TI[:, 7] = 100 * x_TI[:, 7].sign()
    errors = []
    for s in (1.0, 10.0):
        factor_I = torch.ones(256)
        factor_I[7] = s
        errors.append(float(((apply(x_TI / factor_I) * factor_I - x_TI) @ weight_OI.T).square().mean()))
        assert errors[-1] == pytest.approx((255 + 3 * s**2) * (100 / s / 127.5) ** 2 / 12, rel=0.1)
    assert errors[0] / errors[1] == pytest.approx(258 / 555 * 100, rel=0.1)
    block = Block("")
    block.norm, block.one = nn.RMSNorm(256), nn.Linear(256, 256)
    with torch.no_grad():
        block.one.weight.copy_(weight_OI)
    found, factor_I = choose(block, Pair("norm", ("one",), 0.0), x_TI, {"one": CODEC})
    assert factor_I[7] == factor_I.max() and found.error_after < found.error_before / 10
    coded = {"one": (weight_OI, CODEC)}
    rounded_OI = nearest(weight_OI * factor_I.float(), codecs.get(CODEC)).decode() / factor_I.float()
    expected = (apply(x_TI / factor_I.float()) * factor_I.float()) @ rounded_OI.T - x_TI @ weight_OI.T
    assert output_error(coded, x_TI, factor_I.float()) == pytest.approx(
        float(expected.square().sum() / (x_TI @ weight_OI.T).square().sum()), rel=1e-3)


@pytest.mark.parametrize(("kept", "bias", "powers"), [("", False, False), ("one", False, True), ("", True, True)])
def test_what_is_stored_as_a_float_is_divided_by_powers_of_two(kept, bias, powers):
    torch.manual_seed(0)
    block, x_TI = Block(""), torch.randn(512, 32) * torch.logspace(-2, 2, 32)
    block.one = nn.Linear(16, 32, bias=bias)
    kinds = {name: None if name == kept else CODEC for name in ("one", "two")}
    found, factor_P = choose(block, Pair("one", ("two",), None, 4), x_TI, kinds)
    assert found.exponent is not None
    assert torch.equal(factor_P.log2(), factor_P.log2().round()) == powers


def test_outliers_in_the_norms_cost_less_kl(tiny_model, tmp_path):
    """A tiny Llama whose norms make every 16th input 30 times as large: W8A8 by nearest rounding, with and without."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", "bfloat16"), model)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if "layernorm" in name:
            weights[name][::16] *= 30
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            weights[name][:, ::16] /= 30
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    original, view, _, _ = fold(model, tmp_path / "work")
    tokens_NT = torch.randint(2, 384, (4, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = original.model(torch.float32)(input_ids=tokens_NT).logits.log_softmax(-1)
        kl = []
        for checkpoint in (original, view):
            rounded = checkpoint.model(torch.float32)
            for name, layer in rounded.named_modules():
                if ".layers." in name and isinstance(layer, nn.Linear):
                    layer.weight.data = nearest(layer.weight.data, codecs.get(CODEC)).decode()
                    round_inputs(layer, CODEC)
            found = rounded(input_ids=tokens_NT).logits.log_softmax(-1)
            kl.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert kl[1] < kl[0] / 3
