"""Archives end to end: the budget is kept in bytes as written, the level is one for all layers, runs resume."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from supremum import Budget, open_checkpoint, optimize
from supremum.checkpoint.write_archive import ArchiveTarget
from supremum.errors import BudgetError, StateError, SupremumError
from supremum.fill import _solve_table, felt, solve_level
from supremum.gather import gather, gather_fisher
from supremum.job import open_job
from supremum.limits import Curve
from supremum.pipeline import store_without_loss
from supremum.report import read_document
from supremum.solve.water import RARE
from supremum.stats.fisher import HEAD_FISHER, shrunk
from supremum.stats.sweep import HEAD_MOMENTS, moments
from supremum.workspace import Workspace

from .test_pipeline import kl_of_file, text  # noqa: F401  (a fixture)

OWN = ("supremum.json", "report.html", "README.md")


def run(model, source, out, budget, **options):
    return optimize(model, budget, target="archive", text=[source], tokens=1024, out=out, dtype="float32", **options)


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name not in OWN)


def test_size_is_kept_as_written(tiny_model, text, tmp_path):  # noqa: F811
    model = tiny_model("llama", "bfloat16", hidden_size=128, intermediate_size=256)
    whole = sum(path.stat().st_size for path in model.iterdir())
    weights = sum(math.prod(info.shape) for info in open_checkpoint(model).tensors.values())
    budget = whole - weights * 2 + weights * 3 // 8 + 20_000
    result = run(model, text, tmp_path / "out", Budget(size=budget))
    assert 0.97 * budget <= size(result.folder) <= budget
    document = read_document(result.folder)
    assert document["result"]["bytes"] == size(result.folder) and document["proof"]["passed"]
    assert document["proof"]["runtime"] == "transformers"
    assert document["result"]["measured"]["kl_mean"] == pytest.approx(kl_of_file(model, result.folder, text), rel=2e-3)
    gains = document["result"]["gains"]
    assert gains["kl_after"] <= gains["kl_before"] and gains["numbers"] == 2 * 2 * 128  # two norms a block


@pytest.mark.parametrize(("family", "bits"), [("gpt2", 4), pytest.param("albert", 3, marks=pytest.mark.slow)])
def test_bits_are_kept(family, bits, tiny_model, text, tmp_path):  # noqa: F811
    result = run(tiny_model(family, "bfloat16"), text, tmp_path / "out", Budget(bits=bits))
    assert 0.97 * bits <= result.document["result"]["bits_per_weight"] <= bits
    assert result.document["proof"]["passed"]


@pytest.mark.slow
def test_largest_kl_is_kept_and_nearly_used(tiny_model, text, tmp_path):  # noqa: F811
    result = run(tiny_model("llama", "bfloat16", hidden_size=128), text, tmp_path / "out", Budget(max_kl=0.02))
    assert 0.9 * 0.02 <= result.document["result"]["measured"]["kl_mean"] <= 0.02


@pytest.mark.slow
def test_what_is_kept_stays(tiny_model, text, tmp_path):  # noqa: F811
    model = tiny_model("llama", "bfloat16")
    result = run(model, text, tmp_path / "out", Budget(bits=3), keep=["embed", "lm_head", "v_proj"])
    before, after = open_checkpoint(model), open_checkpoint(result.folder)
    for name in before.tensors:
        same = torch.equal(before.read(name).float(), after.read(name).float())
        assert same == (("proj" not in name) or "v_proj" in name), name
    kept = {row["name"]: row for row in result.document["plan"] if row["codec"] == "as it is"}
    assert kept["model.embed_tokens.weight"]["bits_per_weight"] < 13  # bfloat16, coded without loss


def test_one_water_level_for_the_whole_model(tiny_model, text, tmp_path):  # noqa: F811
    """Every weight adds the same to the KL, by the Fisher and the coupling as they were gathered, whatever its layer; so
    layers that matter more have more bits."""
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16", hidden_size=128, intermediate_size=256))
    gathered = gather(checkpoint, Workspace(tmp_path / "work", {}), text=[text], tokens=2048, seed=0, dtype="float32")
    gather_fisher(gathered, 0)
    names = [name for name in gathered.shapes if name not in gathered.stream.tables()]
    level = Curve(gathered.spectra()).level_at_bits(4)
    solved = solve_level(gathered, ArchiveTarget(), names, level, "level", drift=False)
    nats, bits = [], []
    for name in names:
        block, layer = gathered.place(name)
        sums, keys = moments(gathered.workspace, gathered.calls, block)
        change_OI = (solved.coded[name].decode() - gathered.weight(name)).double()
        damage = gathered.fisher(block, layer).double() @ change_OI @ sums[keys[layer]].double() @ change_OI.T
        nats.append(gathered.coupling(block, layer) * float(damage.trace()) / 2 / change_OI.numel())
        bits.append(8 * solved.nbytes[name] / change_OI.numel())
    assert max(bits) - min(bits) > 1.5  # at the same bits their damages would lie apart by 4^1.5 and more
    assert 0.2 * 2.0**level / 2 < min(nats) and max(nats) < 2.0**level / 2  # below theta / 2 as the metrics are damped
    assert max(nats) / min(nats) < 4


def test_budgets_that_cannot_be(tiny_model, text, tmp_path):  # noqa: F811
    model = tiny_model("llama", "bfloat16")
    with pytest.raises(BudgetError, match="too small") as refused:
        run(model, text, tmp_path / "out", Budget(size=10_000))
    least = int(refused.value.remedy.split("--size ")[1].split()[0])
    with pytest.raises(BudgetError, match="more than the other limits allow"):
        run(model, text, tmp_path / "other", Budget(size=least + 1000, max_kl=1e-4))


def test_lossless_is_bit_exact_and_proved(tiny_model, tmp_path):
    model = tiny_model("llama", "bfloat16", hidden_size=256, intermediate_size=512)
    stored = store_without_loss(model, tmp_path / "out")
    assert stored["bits_per_weight"] < 11.2  # small matrices: 10.5 on real ones
    before, after = open_checkpoint(model), open_checkpoint(stored["path"])
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
    assert '"passed": true' in (tmp_path / "out" / "converted.json").read_text()


def test_lossless_of_float32_names_the_remedy(tiny_model, tmp_path):
    with pytest.raises(SupremumError, match="no bfloat16 matrices"):
        store_without_loss(tiny_model("llama"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("budget", [Budget(bits=3.5), Budget(max_kl=0.02)], ids=["bits", "kl"])
def test_killed_between_levels_it_resumes_to_the_same_bytes(budget, tiny_model, text, tmp_path, monkeypatch):  # noqa: F811
    from supremum import fill

    model, real, levels = tiny_model("llama", "bfloat16"), fill.solve_level, []

    def counts(*given, **options):
        levels.append(1)
        return real(*given, **options)

    monkeypatch.setattr(fill, "solve_level", counts)
    whole = run(model, text, tmp_path / "whole", budget).folder
    last = len(levels)
    assert last > 2

    def stops(*given, **options):
        if len(levels) == last - 1:
            raise KeyboardInterrupt
        return counts(*given, **options)

    levels.clear()
    monkeypatch.setattr(fill, "solve_level", stops)
    with pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path / "out", budget)
    monkeypatch.setattr(fill, "solve_level", real)
    resumed = run(model, text, tmp_path / "out", budget).folder
    one, two = (hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (whole, resumed))
    assert one == two


def test_integers_of_an_older_trellis_are_not_gone_on_with(tiny_model, text, tmp_path):  # noqa: F811
    model = tiny_model("llama", "bfloat16")
    job = open_job(model, tmp_path / "out", target="archive", text=[text], tokens=1024, keep=None, only=None, seed=0,
                   dtype="float32")
    Workspace(tmp_path / "out.work", job.inputs | {"archive": 2}).close()
    with pytest.raises(StateError):
        run(model, text, tmp_path / "out", Budget(bits=3))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tables_are_as_fine_as_they_matter(tied, tiny_model, text, tmp_path):  # noqa: F811
    """The embedding's rows by how often their token comes, the head's by their logits' Fisher, a tied table's by both."""
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16", tie_word_embeddings=tied))
    workspace = Workspace(tmp_path / "work", {})
    gathered = gather(checkpoint, workspace, text=[text], tokens=4096, seed=0, dtype="float32")
    gather_fisher(gathered, 0)
    embedding, head = gathered.stream.table_names()
    assert (embedding == head) == tied
    often_O = torch.bincount(gathered.windows.flatten(), minlength=len(gathered.weight(embedding))).double() + 0.5
    found = workspace.load(HEAD_FISHER)
    fisher = shrunk(found["B|head"].double(), float(found["r|head"]))
    fisher_O = felt(fisher.diagonal() if fisher.ndim == 2 else fisher, 1e-6 * gathered.weight(head).shape[1])
    matters = {embedding: often_O / often_O.mean()}
    if tied:
        gradient_Td = gathered.stream.embedding_gradient(
            gathered.windows, workspace.load("gradient/0000.safetensors")["g"]).double().flatten(0, 1)
        inputs = workspace.load(HEAD_MOMENTS)["S"].double().trace()
        matters[head] = often_O / often_O.sum() * gradient_Td.square().sum(1).mean() + fisher_O * inputs
    else:
        matters[head] = fisher_O
    for name, weight_O in matters.items():
        step_O = _solve_table(gathered, name, 1e-6)[name].lattice.frame.row_O.double()  # eighths of an octave
        wanted_O = -4 * (weight_O / weight_O.mean() + RARE).log2()
        assert wanted_O.max() - wanted_O.min() > 4 and (step_O - wanted_O).std() < 0.5, name


def test_what_a_rare_logit_is_taken_for():
    """The error's variance is where the true cost p (exp(s / 2) - 1) falls as fast as the bits buy it: found by trying."""
    p_V = torch.tensor([1e-9, 1e-7, 1e-5, 1e-2], dtype=torch.float64)
    nats, s_S = 1e-6, torch.logspace(-6, 2, 400_001, dtype=torch.float64)
    for p, taken in zip(p_V, felt(p_V, nats), strict=True):
        cost_S = p * torch.special.expm1(s_S / 2) - nats / 2 * s_S.log()  # a bit less is a variance four times as large
        assert float(nats / taken) == pytest.approx(float(s_S[cost_S.argmin()]), rel=1e-3)
        assert taken >= p
