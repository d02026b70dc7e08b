"""The gap of finished files: it adds up, tells codes apart, and refuses another model's file."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from supremum import SupremumError, codecs, measure_gap, open_checkpoint
from supremum.checkpoint.targets import target
from supremum.codecs.lattice import Lattice
from supremum.gap import FileGap, gap_of
from supremum.gather import gather, gather_fisher
from supremum.limits.entropy import float_bits
from supremum.report.gap import render_gap
from supremum.solve import Metric, nearest, solve
from supremum.solve.water import flat
from supremum.stats.streaming import BlockStream
from supremum.stats.sweep import moments, sweep
from supremum.workspace import Workspace

from .test_pipeline import text  # noqa: F401  (a fixture)

SIZES = {"hidden_size": 128, "intermediate_size": 256}


def measured(file, model, source) -> FileGap:
    return measure_gap(file, model, text=[source], tokens=4096, dtype="float32")


def inner(checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if ".layers." in name and "proj" in name]


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", "bfloat16", **SIZES)


def integers(checkpoint, folder, solver):
    return target("compressed-tensors").write(checkpoint, {name: solver(name) for name in inner(checkpoint)}, folder)


def test_it_adds_up_and_fits_a_terminal(model, text, tmp_path):  # noqa: F811
    checkpoint = open_checkpoint(model)
    codec = codecs.get("int4-g64")
    file = integers(checkpoint, tmp_path / "int4", lambda name: nearest(checkpoint.read(name).float(), codec))
    gap = measured(file, model, text)
    assert sum(gap.parts.values()) == pytest.approx(gap.gap, abs=1e-6)
    assert gap.gap == pytest.approx(gap.bits - gap.least_bits)
    assert 4.25 <= gap.bits < 4.3 and len(gap.layers) == 14 and gap.kl > 0
    assert all(layer.gap == pytest.approx(layer.bits - layer.least_bits) for layer in gap.layers)
    said = shown(gap)
    assert "error feedback" in said and max(map(len, said.splitlines())) <= 80


def test_feedback_is_told_from_nearest_rounding(model, text, tmp_path):  # noqa: F811
    """On the same grid: the fed-back file has less gap and no feedback left to be had."""
    checkpoint = open_checkpoint(model)
    stream = BlockStream(checkpoint, dtype=torch.float32)
    windows = torch.randint(0, 300, (32, 128), generator=torch.Generator().manual_seed(0))
    workspace = Workspace(tmp_path / "work", {})
    sweep(stream, windows, workspace)
    metrics = {}
    for block in stream.blocks:
        sums, keys = moments(workspace, stream.calls(windows), block)
        metrics |= {f"{block}.{layer}.weight": Metric.of(sums[key], damping=0.01) for layer, key in keys.items()}
    codec = codecs.get("int3-g64")
    plain = measured(integers(checkpoint, tmp_path / "plain",
                              lambda name: nearest(checkpoint.read(name).float(), codec)), model, text)
    fed = measured(integers(checkpoint, tmp_path / "fed",
                            lambda name: solve(checkpoint.read(name).float(), metrics[name], codec)), model, text)
    assert plain.parts["error feedback"] > 0.1
    assert fed.parts["error feedback"] < plain.parts["error feedback"]
    assert sum(layer.gap for layer in fed.layers) < sum(layer.gap for layer in plain.layers)


def test_a_file_of_vector_types_is_read(tiny_model, text, tmp_path):  # noqa: F811
    """All seven of llama.cpp's, in turn over the layers: the rate is that of their bytes."""
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16", hidden_size=256, intermediate_size=512))
    types = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
    coded = {name: nearest(checkpoint.read(name).float(), codecs.get(types[k % len(types)]))
             for k, name in enumerate(inner(checkpoint))}
    gap = measured(target("gguf").write(checkpoint, coded, tmp_path), checkpoint.path, text)
    weights = sum(one.shape[0] * one.shape[1] for one in coded.values())
    assert gap.bits == pytest.approx(8 * sum(one.nbytes for one in coded.values()) / weights)
    assert len(gap.layers) == len(coded) and gap.kl > 0 and gap.gap > 0


def test_an_archive_is_nearer_than_integers_of_a_fixed_length(model, text, tmp_path):  # noqa: F811
    checkpoint = open_checkpoint(model)
    coded: dict[str, Lattice] = {name: flat(checkpoint.read(name).float(), 4.0) for name in inner(checkpoint)}
    archive = measured(target("archive").write(checkpoint, coded, tmp_path / "archive"), model, text)
    fixed = measured(integers(checkpoint, tmp_path / "fixed",
                              lambda name: nearest(checkpoint.read(name).float(), codecs.get("int4-g64"))), model, text)
    left = archive.parts["less side information, a closer entropy code"]
    assert left < fixed.parts["an entropy code, fewer scales, rows' weights"] - 0.3


def test_a_coarse_embedding_is_a_part_of_its_own(model, text, tmp_path):  # noqa: F811
    """As much as the limit falls by when the same layers have the original's embedding."""
    checkpoint = open_checkpoint(model)
    coded = {name: nearest(checkpoint.read(name).float(), codecs.get("Q8_0")) for name in inner(checkpoint)}
    tables = BlockStream(checkpoint, dtype=torch.float32).tables()
    both = coded | {name: nearest(checkpoint.read(name).float(), codecs.get("Q4_0")) for name in tables}
    kept, coarse = (measured(target("gguf").write(checkpoint, every, tmp_path / name), model, text)
                    for name, every in (("kept", coded), ("coarse", both)))
    part = "a finer embedding and head"
    assert kept.parts[part] == 0 and coarse.parts[part] > 0.5
    assert coarse.parts[part] == pytest.approx(kept.least_bits - coarse.least_bits)
    assert sum(coarse.parts.values()) == pytest.approx(coarse.gap, abs=1e-6)
    missed = "what the layers' sum misses"
    assert coarse.parts[missed] == pytest.approx(kept.parts[missed], abs=1e-6)


def test_trained_norms_are_part_of_a_file_and_of_what_the_sum_misses(model, text, tmp_path):  # noqa: F811
    checkpoint, codec = open_checkpoint(model), codecs.get("int4-g64")

    def change(name, tensor):
        factor = 1 + 0.03 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        return tensor * factor.to(tensor.dtype) if tensor.ndim == 1 else tensor

    coded = {name: nearest(checkpoint.read(name).float(), codec) for name in inner(checkpoint)}
    plain, moved = (measured(target("compressed-tensors").write(one, coded, tmp_path / name), model, text)
                    for name, one in (("plain", checkpoint), ("moved", checkpoint.changed(change))))
    misses = "what the layers' sum misses"
    assert moved.kl > plain.kl and moved.bits == plain.bits
    assert moved.parts[misses] - plain.parts[misses] == pytest.approx(moved.gap - plain.gap, abs=1e-6)
    assert sum(layer.gap for layer in moved.layers) == pytest.approx(sum(layer.gap for layer in plain.layers), abs=1e-6)


def shown(gap: FileGap) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_gap(gap))
    return console.export_text()


def test_an_exact_copy_is_held_against_the_entropy_of_its_numbers(model, text, tmp_path):  # noqa: F811
    gap = measured(model, model, text)
    checkpoint = open_checkpoint(model)
    weights = {name: checkpoint.read(name) for name in inner(checkpoint)}
    entropy = sum(float_bits(weight)[0] * weight.numel() for weight in weights.values())
    assert gap.bits == 16 and gap.kl < 1e-9 and not gap.layers
    assert gap.least_bits == pytest.approx(entropy / sum(weight.numel() for weight in weights.values()))
    assert gap.gap == pytest.approx(16 - gap.least_bits) and 3 < gap.gap < 6
    said = shown(gap)
    assert "to the bit" in said and "(measured)" in said and "By kind" not in said


def test_a_copy_of_a_coded_original_claims_no_entropy(model, text, tmp_path):  # noqa: F811
    checkpoint, codec = open_checkpoint(model), codecs.get("int4-g64")
    coded = integers(checkpoint, tmp_path / "int4", lambda name: nearest(checkpoint.read(name).float(), codec))
    gap = measured(coded, coded, text)
    assert gap.gap == 0 and not gap.parts and "coded themselves" in gap.remark and "bound" in shown(gap)


def test_of_a_tuned_file_the_model_is_compared_and_no_layer(model, text, tmp_path):  # noqa: F811
    checkpoint, codec = open_checkpoint(model), codecs.get("int4-g64")
    tuned = checkpoint.changed(lambda name, tensor: tensor * 1.5 if tensor.ndim == 1 else tensor)
    file = target("compressed-tensors").write(tuned, {name: nearest(tuned.read(name).float(), codec)
                                                      for name in inner(tuned)}, tmp_path / "tuned")
    gap = measured(file, model, text)
    assert not gap.layers and not gap.parts and gap.gap == pytest.approx(gap.bits - gap.least_bits)
    assert "smoothed, or its norms tuned" in " ".join(shown(gap).split())


def test_another_models_file_is_refused(model, tiny_model, text):  # noqa: F811
    with pytest.raises(SupremumError, match="another shape"):
        measured(tiny_model("llama", "bfloat16"), model, text)


FORMATS = [("gguf", "Q4_0"), ("gguf", "Q6_K"), ("gptq", "gptq4-g64"), ("compressed-tensors", "fp8-channel"),
           ("compressed-tensors", "fp8-b128"), ("compressed-tensors", "mxfp4-g32"), ("compressed-tensors", "nvfp4-g16"),
           ("compressed-tensors", "mxfp6-g32"), ("compressed-tensors", "ternary-g64"), ("compressed-tensors", "uint3-g64"),
           ("compressed-tensors", "int8-channel-a8")]


@pytest.fixture(scope="module")
def gathered(tiny_model, text, tmp_path_factory):  # noqa: F811
    model = tiny_model("llama", "bfloat16", hidden_size=256, intermediate_size=256)
    found = gather(open_checkpoint(model), Workspace(tmp_path_factory.mktemp("gap"), {}), text=[text], tokens=4096, seed=0,
                   dtype="float32")
    gather_fisher(found, 0)
    return found


@pytest.mark.parametrize(("kind", "name"), FORMATS)
def test_a_file_of_any_format_is_read_as_it_was_written(kind, name, gathered, tmp_path):
    """Bits are those of the codes, damage is tr(B dW S dW^T) / 2 in float64 of what they decode to, whatever the layout."""
    checkpoint = gathered.checkpoint
    coded = {tensor: nearest(gathered.weight(tensor), codecs.get(name)) for tensor in inner(checkpoint)}
    gap = gap_of(gathered, open_checkpoint(target(kind).write(checkpoint, coded, tmp_path)))
    layers = {layer.name: layer for layer in gap.layers}
    assert set(layers) == set(coded)
    for block in gathered.stream.blocks:
        sums, keys = moments(gathered.workspace, gathered.calls, block)
        for layer, key in keys.items():
            tensor = gathered.inner(block, layer)
            change_OI = (coded[tensor].decode() - gathered.weight(tensor)).double()
            trace = ((gathered.fisher(block, layer).double() @ change_OI @ sums[key].double()) * change_OI).sum()
            assert layers[tensor].nats == pytest.approx(float(trace) / 2, rel=1e-3)
            stored = sum(part.nbytes for part in coded[tensor].tensors.values())
            assert layers[tensor].bits == pytest.approx(8 * stored / change_OI.numel(), rel=0.01)
    assert gap.kl > 0 and sum(gap.parts.values()) == pytest.approx(gap.gap, abs=1e-6)
