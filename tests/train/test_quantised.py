"""QLoRA: the same products and gradients as a float layer's, the same step as LoRA's, no weight in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as again

from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.train import quantised
from supremum.train.base import load
from supremum.train.quantised import QuantisedLinear, quantised_layers
from supremum.train.several import tune_several
from supremum.train.tasks import make
from supremum.train.tune import tune
from supremum.train.ways import Way, blocks, counts, merged, prepare
from tests.train.test_options import quantised as quantised_base
from tests.train.test_tune import recipe as tuning

TASK = {"length": 32}


def pair(bias: bool = True) -> tuple[nn.Linear, QuantisedLinear]:
    plain = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    return plain, QuantisedLinear(24, 40, plain.bias, lambda: plain.weight.detach().clone())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 7, 24)])
def test_products_and_gradients_are_a_float_layers(shape: tuple[int, ...], recomputed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layers, x = pair(bias), torch.randn(shape)
    found = []
    for layer in layers:
        own = x.clone().requires_grad_()
        y = again(layer, own, use_reentrant=False) if recomputed else layer(own)
        (y ** 3).sum().backward()
        found.append((y.detach(), own.grad))
    for one, other in zip(*found, strict=True):
        assert isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def test_mixed_precision_computes_in_bfloat16_as_a_float_layer_does() -> None:
    torch.manual_seed(0)
    x, found = torch.randn(5, 24), []
    for layer in pair():
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(own)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert own.grad is not None and own.grad.dtype == torch.float32
        found.append((y.detach(), own.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_gradient() -> None:
    sizes: list[int] = []

    def seen(value: Tensor) -> Tensor:
        sizes.append(value.numel())
        return value

    plain, kept = pair()
    x = torch.randn(2, 24, requires_grad=True)
    for layer, most in ((plain, plain.weight.numel()), (kept, 0)):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda value: value):
            layer(x)
        assert max(sizes, default=0) == most


def test_a_step_of_lora_is_the_same_on_either_base(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The same adapter on the same numbers, decoded once or whenever they are wanted: loss, gradients, merged weights."""
    base = str(quantised_base("compressed-tensors", "llama", tiny_model, tmp_path))
    found = []
    for way in ("lora", "qlora"):
        model, *_ = load(base, make("instruct", TASK, "here"), 0, quantised=way == "qlora")
        floats = sum(p.numel() for p in model.parameters())
        torch.manual_seed(1)
        adapted, _ = prepare(model, Way(way, rank=3), 10)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        assert bool(quantised_layers(adapted)) == (way == "qlora")
        ids = torch.arange(2, 34).view(2, 16)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
        numbers = counts(adapted)
        plain = merged(adapted)
        weights = dict(plain.named_parameters()) | {f"{name}.weight": layer.decode()
                                                    for name, layer in quantised_layers(plain).items()}
        assert not any("lora" in name or "base_layer" in name for name in weights)
        with torch.no_grad():
            found.append((loss.detach(), gradients, weights, numbers, plain(input_ids=ids).logits, floats))
    one, other = found
    assert torch.equal(one[0], other[0]) and one[3] == other[3] and one[2].keys() == other[2].keys()
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert all(torch.allclose(value, other[2][name], rtol=0, atol=1e-6) for name, value in one[2].items())
    assert torch.allclose(one[4], other[4], atol=1e-5)
    assert other[5] < one[5] / 2  # no layer of the blocks is among the parameters


def test_what_is_written_opens_as_a_plain_folder(tiny_model: Callable[..., Path], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised_base("gguf", "llama", tiny_model, tmp_path)
    path = tuning(tmp_path, base, "qlora", lstm=False)
    scored: list[dict[str, Tensor]] = []
    before = quantised.write_missing

    def written(model: nn.Module, folder: Path) -> None:
        scored.append({f"{name}.weight": layer.decode() for name, layer in quantised_layers(model).items()})
        before(model, folder)

    monkeypatch.setattr("supremum.train.tune.write_missing", written)
    done = tune(path, tmp_path, tmp_path / "out", changes=["steps=2", "epochs=null"])
    tensors, opened = load_file(tmp_path / "out" / "model.safetensors"), open_checkpoint(tmp_path / "out")
    assert len(scored[0]) == 14 and all(torch.equal(tensors[name], value) for name, value in scored[0].items())
    assert opened.tensors.keys() <= tensors.keys() and done.parameters > sum(v.numel() for v in scored[0].values())
    assert not list((tmp_path / "out").glob(".*"))


def test_several_tasks_share_a_quantised_trunk(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = quantised_base("compressed-tensors", "bert", tiny_model, tmp_path)
    one = json.loads(tuning(tmp_path, base, "qlora", lstm=False).read_text())
    part = {"task": one.pop("task"), "data": one.pop("data")}
    (tmp_path / "both.yaml").write_text(json.dumps(one | {"tasks": {"a": part, "b": part}}))
    tune_several(tmp_path / "both.yaml", tmp_path, tmp_path / "out", changes=["steps=2", "epochs=null"])
    a, b = (load_file(tmp_path / "out" / name / "model.safetensors") for name in "ab")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], open_checkpoint(base).read(name).float())


def test_only_layers_of_the_blocks_stay_quantised(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Heads and poolers are trained, or multiplied once a token: they are floats."""
    checkpoint = open_checkpoint(quantised_base("compressed-tensors", "llama", tiny_model, tmp_path))
    model = checkpoint.skeleton()
    names = quantised.keep_quantised(model, blocks(model)[:1], checkpoint, {name: name for name in checkpoint.tensors})
    assert len(names) == 7 and all(name.startswith("model.layers.0.") for name in names)


def test_a_base_of_floats_is_refused_before_it_is_trained(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match=r"way: qlora keeps .*the blocks of this model have none.*Quantise it first"):
        load(str(tiny_model("llama")), make("instruct", TASK, "here"), 0, quantised=True)


def test_a_head_is_drawn_and_all_else_is_the_bases(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = quantised_base("compressed-tensors", "bert", tiny_model, tmp_path)
    task = make("classify", TASK, "here")
    task.labels = ["x", "y"]
    one, other = (load(str(base), task, seed, quantised=True)[0] for seed in (0, 1))
    stored = open_checkpoint(base)
    assert not any(tensor.is_meta for tensor in (*one.parameters(), *one.buffers()))
    assert float(one.classifier.weight.std()) == pytest.approx(one.config.initializer_range, rel=0.3)
    assert not one.classifier.bias.any()
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    for name, parameter in one.named_parameters():
        if name in stored.tensors:
            assert torch.equal(parameter, stored.read(name).float()), name
    assert torch.equal(one.bert.embeddings.position_ids, torch.arange(one.config.max_position_embeddings)[None])
