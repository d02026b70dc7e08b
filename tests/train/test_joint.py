"""Two domains: the mixed loss by its definition, the reversed gradient, and a result without the domain classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from supremum.errors import SupremumError
from supremum.train.base import load as load_base
from supremum.train.joint import DOMAIN, Joint, Reverse, Source, both, paired
from supremum.train.tasks import make
from supremum.train.tune import tune
from tests.conftest import tiny_tokenizer
from tests.train.test_tune import recipe


def test_the_gradient_is_reversed_and_scaled() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    out = Reverse.apply(values, 0.25)
    assert torch.equal(out, values)
    (out * torch.tensor([4.0, 8.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-1.0, -2.0]


def test_both_losses(tiny_model: Callable[..., Path]) -> None:
    """Mixed: the weighted sum of the two. Reversed: the domain classifier descends what the trunk climbs, so the trunk's
    gradient is that of the task minus `reverse` times that of the domains."""
    task, tokenizer = make("classify", {}, "r.yaml"), tiny_tokenizer()
    rows = [{"where": "", "text": f"the river {n}", "label": "ab"[n % 2]} for n in range(5)]
    task.learn(rows)
    pairs = both(task.collate(tokenizer))(paired(task.encode(rows[:2], tokenizer), task.encode(rows[2:], tokenizer)))
    assert len(pairs["source"]["labels"]) == 3
    model = load_base(str(tiny_model("bert")), task, 0)[0].eval()
    one, other = (float(task.loss(model, pairs[side])) for side in ("source", "target"))
    assert float(Joint(task, model, Source((), alpha=0.3)).loss(model, pairs)) == pytest.approx(0.3 * one + 0.7 * other)

    def gradients(reverse: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        joint = Joint(task, model, Source((), reverse=reverse))
        model.zero_grad()
        joint.loss(model, pairs).backward()
        found = model.bert.encoder.layer[0].output.dense.weight.grad.clone(), joint.domain.weight.grad.clone()
        joint.leave(model)
        return found

    model.zero_grad()
    task.loss(model, pairs["source"]).backward()
    alone = model.bert.encoder.layer[0].output.dense.weight.grad.clone()
    (weak, head), (strong, same) = gradients(0.5), gradients(2.0)
    assert torch.equal(head, same) and head.abs().max() > 0
    assert torch.allclose(strong - alone, 4 * (weak - alone), atol=1e-6) and (weak - alone).abs().max() > 1e-5
    assert not hasattr(model, DOMAIN)


@pytest.mark.parametrize("source", [{"alpha": 0.5}, {"reverse": 0.1}])
def test_a_run_on_two_domains(source: dict[str, float], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_model("bert"), "lora")
    settings = json.loads(path.read_text()) | {"source": {"train": "train.tsv"} | source}
    path.write_text(json.dumps(settings))
    done = tune(path, tmp_path, tmp_path / "out")
    assert done.lines[0].metric.value == 1.0
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if DOMAIN in name]


def test_the_source_may_have_columns_of_its_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The same rows in another form give the same model; a column that the task lacks is refused."""
    path = recipe(tmp_path, tiny_model("bert"), "lora", epochs=0.5, lstm=False)
    rows = [line.split("\t") for line in (tmp_path / "train.tsv").read_text().splitlines()]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"said": text, "mood": label}) for text, label in rows))
    settings = json.loads(path.read_text())
    other = {"train": "other.jsonl", "columns": {"text": "said", "label": "mood"}, "kind": "auto"}
    made = []
    for name, source in (("same", {"train": "train.tsv"}), ("other", other)):
        path.write_text(json.dumps(settings | {"source": source}))
        tune(path, tmp_path, tmp_path / name)
        made.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    path.write_text(json.dumps(settings | {"source": other | {"columns": {"said": 0}}}))
    with pytest.raises(SupremumError, match=r"source\.columns: the task classify has no column 'said'"):
        tune(path, tmp_path, tmp_path / "out")
