"""The report of the information limit, the published constants, and the page that shows them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from supremum.limits import Limits, constants, information, limits, render, spectrum
from supremum.limits.entropy import TensorEntropy, summarise
from supremum.limits.hardware import Machine, Peak, Read
from supremum.limits.information import Curve, LayerSpectrum
from supremum.limits.topology import Cache
from supremum.plain import plain

MACHINE = Machine(
    "cpu", "a test machine", 2, 10**9, (Cache(2, 2**20, 1, "measured"), Cache(3, 2**25, 2, "estimate")),
    (Read("L2", 2**19, 1, 90.0, 100.0), Read("memory", 2**27, 1, 9.0, 10.0)),
    (Peak("float32", 1, 90.0, 100.0), Peak("int8", 1, 200.0, 210.0)), busy=0.5,
)  # fmt: skip


@dataclass
class Info:
    shape: tuple[int, ...]
    kind: str
    nbytes: int


def checkpoint() -> SimpleNamespace:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=48, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(config).bfloat16().state_dict()
    state.pop("lm_head.weight")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return SimpleNamespace(
        source="[tiny]", format="safetensors", config=config, skeleton=lambda: skeleton, read=state.__getitem__,
        tensors={name: Info(tuple(t.shape), "BF16", t.nbytes) for name, t in state.items()},
    )  # fmt: skip


def statistics(model: SimpleNamespace) -> list[LayerSpectrum]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for name in model.tensors:
        weight = model.read(name)
        if "proj" in name:
            x = torch.randn(12 * weight.shape[1], weight.shape[1], generator=generator)
            fisher = torch.rand(len(weight), generator=generator) / 50
            out.append(spectrum(name, weight, x.T @ x / len(x), fisher, tokens=len(x)))
    return out


@pytest.fixture(scope="module")
def full() -> Limits:
    model = checkpoint()
    return limits(model, statistics(model), machine=MACHINE, reached=(4.25, 0.05))


def test_every_number_has_its_kind(full):
    info = full.information
    curve = Curve(statistics(checkpoint()))
    assert set(info.bits_at_kl) == {"0.01", "0.05", "0.1"} and set(info.kl_at_bits) == {"2", "3", "4"}
    assert {v.kind for v in (*info.bits_at_kl.values(), *info.kl_at_bits.values())} == {"bound"}
    assert info.stored.value == 16 and info.stored.kind == info.lossless.kind == "measured"
    assert info.bits_at_kl["0.05"].value == pytest.approx(curve.bits_at_kl(0.05))
    assert info.gap_of_file["KL 0.05"].value == pytest.approx(16 - curve.bits_at_kl(0.05))
    assert info.gap_of_file["reached"].value == pytest.approx(4.25 - curve.bits_at_kl(0.05))
    assert info.gap_of_file["reached"].kind == "estimate"
    assert sum(row.kl_share for row in info.layers) == pytest.approx(1)
    mean = sum(row.bits * math.prod(row.shape) for row in info.layers) / info.weights
    assert mean == pytest.approx(info.bits_at_kl["0.05"].value)
    assert any("12.0 tokens" in line for line in info.assumptions)
    assert any("negentropy" in line for line in info.assumptions)
    assert any("diagonal" in line for line in info.assumptions)
    assert any("50 %" in line for line in full.hardware.assumptions)


def test_the_report_is_json(full):
    text = json.dumps(full.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["information"]["bits_at_kl"]["0.1"]["kind"] == "bound"
    assert back["hardware"]["machine"]["reads"][0]["best_gb_s"] == 100
    assert plain({"a": math.inf, 1: (math.nan, 2)}) == {"a": None, "1": [None, 2]}


def test_the_page_fits_80_columns_and_labels_its_tables(full):
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(render(full))
    page = captured.get()
    assert max(len(line.rstrip()) for line in page.splitlines()) <= 80
    assert "…" not in page
    for text in ("[tiny]", "measured", "bound", "estimate", "down_proj", "Decode", "Prefill", "Q4_0", "cache sizes"):
        assert text in page


def test_without_statistics_the_machine_and_the_lossless_size_remain():
    model = checkpoint()
    result = limits(model, machine=MACHINE)
    assert not result.information.curve and not result.information.layers
    assert set(result.information.gap_of_file) == {"lossless"}
    console = Console(width=80)
    with console.capture() as captured:
        console.print(render(result))
    assert "without changing a weight" in captured.get()


def test_a_large_damage_is_marked_as_beyond_the_second_order():
    noisy = [replace(layer, weight_variance=1e3 * layer.weight_variance) for layer in statistics(checkpoint())]
    assert "second order" in information(noisy).kl_at_bits["2"].note


def test_opaque_tensors_are_named():
    both = summarise([TensorEntropy("a", "BF16", 10, 16, 11, "none"), TensorEntropy("b", "NEW", 10, 4, 4, "")])
    assert "NEW counted as stored" in information(lossless=both).lossless.note


def test_constants_are_other_people_s_and_say_whether_they_were_checked():
    rows = constants()
    besiroglu = rows["scaling.besiroglu_2024"]
    assert besiroglu.verified and besiroglu.errors["alpha"] == 0.02
    value = besiroglu.value("E")
    assert value.kind == "estimate" and value.note.startswith("other people's: Besiroglu")
    assert "not checked" in rows["energy.memory"].value("hbm").note
    for row in rows.values():
        assert row.values and row.unit and row.source and row.date
        assert set(row.errors) | set(row.intervals) <= set(row.values)
        assert all(low <= row.values[key] <= high for key, (low, high) in row.intervals.items())


def test_the_ladder_of_llama_cpp_follows_six_decibels_a_bit():
    """A rough check of KL ~ 4^-bits on other people's files: over two bits, within a quarter."""
    ladder = constants()["quality.kl_ladder_mistral_7b"].values
    predicted = 4.0 ** (4.32 - 2.20)
    assert ladder["2.20"] / ladder["4.32"] == pytest.approx(predicted, rel=0.25)
