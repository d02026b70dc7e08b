"""The final solve: the drift-corrected target is a regression, and the compressed model is nearer with it than without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.solve import Metric, final, nearest
from supremum.solve.candidates import load_coded
from supremum.solve.final import RIDGE, Drift, _drift, _targets, solve_final
from supremum.solve.walk import Seen
from supremum.stats.fisher import fisher, fisher_file
from supremum.stats.streaming import BlockStream, linears, orientation, set_weight
from supremum.stats.sweep import hidden_file, sweep
from supremum.workspace import Workspace

from . import reference


def inputs(seed: int = 0, drift: float = 0.3) -> tuple[Tensor, Tensor]:
    """Original inputs x and drifted ones (tokens, I)."""
    draw = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(120, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    return x_TI, x_TI + drift * torch.randn(120, 24, generator=draw) @ torch.randn(24, 24, generator=draw)


def drift(x_TI: Tensor, drifted_TI: Tensor, held_TO: Tensor | None = None, weight_T: Tensor | None = None) -> Drift:
    """The moments as the definitions say."""
    tokens = len(x_TI)
    weighted_TI = drifted_TI if weight_T is None else drifted_TI * weight_T[:, None]
    return Drift(drifted_TI.T @ weighted_TI / tokens, (x_TI - drifted_TI).T @ weighted_TI / tokens,
                 None if held_TO is None else held_TO.T @ weighted_TI / tokens)


def test_target_is_the_ridge_regression_towards_the_weight() -> None:
    """W* = argmin ||X W^T - Xh W*^T||^2 / T + ||(W* - W) Lambda^1/2||^2, solved by float64 least squares."""
    (x_TI, drifted_TI), weight_OI = inputs(), reference.weights(5, 24)
    ridge_II = (RIDGE * drifted_TI.double().square().sum(0)).sqrt().diag()
    left = torch.cat([drifted_TI.double(), ridge_II])
    right = torch.cat([x_TI.double(), ridge_II]) @ weight_OI.T.double()
    expected_OI = torch.linalg.lstsq(left, right).solution.T
    found = _targets({"a": weight_OI[:2], "b": weight_OI[2:]}, drift(x_TI, drifted_TI))
    torch.testing.assert_close(torch.cat([found["a"], found["b"]]).double(), expected_OI, rtol=1e-4, atol=1e-5)
    assert (expected_OI - weight_OI).abs().max() > 0.05  # there is something to correct


def test_target_of_a_writer_also_mends_what_the_stream_holds() -> None:
    """The same regression onto X W^T + (R - Rh)."""
    (x_TI, drifted_TI), weight_OI = inputs(), reference.weights(5, 24)
    held_TO = 0.5 * torch.randn(120, 5, generator=torch.Generator().manual_seed(3))
    ridge_II = (RIDGE * drifted_TI.double().square().sum(0)).sqrt().diag()
    left = torch.cat([drifted_TI.double(), ridge_II])
    right = torch.cat([(x_TI @ weight_OI.T + held_TO).double(), ridge_II @ weight_OI.T.double()])
    expected_OI = torch.linalg.lstsq(left, right).solution.T
    found_OI = _targets({"a": weight_OI}, drift(x_TI, drifted_TI, held_TO))["a"]
    torch.testing.assert_close(found_OI.double(), expected_OI, rtol=1e-4, atol=1e-5)


def test_target_is_the_weight_where_nothing_drifted() -> None:
    (x_TI, _), weight_OI = inputs(), reference.weights(5, 24)
    x_TI[:, 7] = 0  # and a dead input
    assert torch.equal(_targets({"a": weight_OI}, drift(x_TI, x_TI))["a"], weight_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_the_drift(dtype: torch.dtype) -> None:
    """Batch by batch what the whole gives, each token by its weight; in bfloat16 rounded to 8 bits."""
    (x_TI, drifted_TI), draw = inputs(), torch.Generator().manual_seed(5)
    x_TI, drifted_TI = x_TI.to(dtype), drifted_TI.to(dtype)
    held_TO, drifted_TO = (torch.randn(120, 5, generator=draw).to(dtype) for _ in range(2))
    weight_T = torch.rand(120, generator=draw) * 2
    found = _drift(*(Seen(list(x.split(40)), list(r.split(40))) for x, r in ((x_TI, held_TO), (drifted_TI, drifted_TO))),
                   weight_T)
    exact = drift(x_TI.double(), drifted_TI.double(), held_TO.double() - drifted_TO.double(), weight_T.double())
    slack = 1e-6 if dtype == torch.float32 else 0.01
    for one, other, limit in ((found.moment_II, exact.moment_II, slack), (found.change_II, exact.change_II, slack),
                              (found.mend_dI, exact.mend_dI, slack)):
        assert one is not None and other is not None
        assert float((one - other).norm()) < limit * float(other.norm())


def prepared(folder: Path, model: Path) -> tuple[BlockStream, Tensor, Workspace, dict[str, tuple[int, int]]]:
    """A swept tiny model on random tokens."""
    stream = BlockStream(open_checkpoint(model), dtype=torch.float32)
    windows_NT = torch.randint(2, 380, (12, 32), generator=torch.Generator().manual_seed(0))
    workspace = Workspace(folder, {})
    sweep(stream, windows_NT, workspace)
    fisher(stream, windows_NT, workspace, length=32, seed=0)
    return stream, windows_NT, workspace, {name: shape for name, (shape, _) in orientation(stream).items()}


def oriented(stream: BlockStream) -> Callable[[str], Tensor]:
    turned = {name: turned for name, (_, turned) in orientation(stream).items()}

    def weight(name: str) -> Tensor:
        weight = stream.checkpoint.read(name).float()
        return weight.T.contiguous() if turned[name] else weight

    return weight


def final_hidden(stream: BlockStream, windows_NT: Tensor, replaced: Callable[[str], Tensor | None],
                 inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Hidden states after the last block, by running every block with the given weights; `inputs`: x (T, I) by layer."""
    hidden_NTd = stream.embed(windows_NT)
    for call in stream.calls(windows_NT):
        with stream.block(call.block) as block, torch.no_grad():
            for inner, layer in linears(block).items():
                if (weight_OI := replaced(f"{call.block}.{inner}.weight")) is not None:
                    set_weight(layer, weight_OI)

                def look(module: nn.Module, args: tuple[Tensor], name: str = f"{call.block}.{inner}.weight") -> None:
                    (inputs if inputs is not None else {})[name] = args[0].flatten(0, -2)

                layer.register_forward_pre_hook(look)
            hidden_NTd = block(hidden_NTd, *call.args, **call.kwargs)
    return hidden_NTd


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_is_solved_on_what_it_really_sees(family: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """The kept hidden states are those of the files' weights, and nearer to the original's than nearest rounding leads."""
    stream, windows_NT, workspace, shapes = prepared(tmp_path / "work", tiny_model(family))
    plan = {name: "int3-g32" for name in shapes if name not in stream.table_names()}
    del plan[next(iter(plan))]  # one layer stays as it is
    weight = oriented(stream)
    files = solve_final(stream, windows_NT, workspace, plan, weight, shapes, "final", {})
    assert files.keys() == plan.keys()

    def solved(name: str) -> Tensor | None:
        if name not in files:
            return None
        return load_coded(workspace, files[name], name, "int3-g32", shapes[name]).decode()

    def rounded(name: str) -> Tensor | None:
        return nearest(weight(name), codecs.get("int3-g32")).decode() if name in plan else None

    reached_NTd = final_hidden(stream, windows_NT, solved)
    last = f"final/{hidden_file(len(stream.calls(windows_NT)))}"
    torch.testing.assert_close(workspace.load(last)["h"], reached_NTd, rtol=1e-4, atol=1e-4)
    original_NTd = final_hidden(stream, windows_NT, lambda name: None)
    ours, theirs = ((hidden_NTd - original_NTd).square().mean()
                    for hidden_NTd in (reached_NTd, final_hidden(stream, windows_NT, rounded)))
    assert ours < 0.75 * theirs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_correcting_the_drift_pays(family: str, tmp_path: Path, tiny_model: Callable[..., Path],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks at three bits: the error at the end, against the solver without it. Measured: 0.05."""
    monkeypatch.setattr(final, "RIDGE", 0.05)  # the text is the one that was solved for: little ridge is needed
    model = tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    errors = []
    for corrected in (True, False):
        if not corrected:
            monkeypatch.setattr(final, "_targets", lambda weights, drift: weights)
        stream, windows_NT, workspace, shapes = prepared(tmp_path / str(corrected), model)
        plan = {name: "int3-g32" for name in shapes if name not in stream.table_names()}
        solve_final(stream, windows_NT, workspace, plan, oriented(stream), shapes, "final", {})
        last = hidden_file(len(stream.calls(windows_NT)))
        errors.append((workspace.load(f"final/{last}")["h"] - workspace.load(last)["h"]).square().mean())
    assert errors[0] < 0.1 * errors[1]


def test_later_layers_see_the_errors_of_earlier_ones(tmp_path: Path, tiny_model: Callable[..., Path],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric of the very last layer is the second moment of its inputs in the compressed model, each token weighed."""
    stream, windows_NT, workspace, shapes = prepared(tmp_path / "work", tiny_model("llama"))
    plan = {name: "int2-g32" for name in shapes if name not in stream.table_names()}
    used = []
    monkeypatch.setattr(final.Metric, "of", classmethod(
        lambda cls, moment_II, of=Metric.of, **options: used.append(moment_II) or of(moment_II, **options)))
    files = solve_final(stream, windows_NT, workspace, plan, oriented(stream), shapes, "final", {})
    found: dict[str, Tensor] = {}
    final_hidden(stream, windows_NT, lambda name: load_coded(
        workspace, files[name], name, "int2-g32", shapes[name]).decode(), found)
    last = next(reversed(plan))
    assert last.endswith("down_proj.weight")
    score_T = workspace.load(fisher_file(len(stream.blocks) - 1))["w|mlp.down_proj"].flatten()
    weighted_TI = found[last] * (score_T / score_T.mean())[:, None]
    torch.testing.assert_close(used[-1], weighted_TI.T @ found[last] / len(score_T), rtol=1e-3, atol=1e-5)


def test_a_killed_solve_continues_with_the_same_bytes(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    found = []
    for kill in (False, True):
        stream, windows_NT, workspace, shapes = prepared(tmp_path / str(kill), tiny_model("llama"))
        plan = {name: "int4-g32" for name in shapes if name not in stream.table_names()}
        if kill:
            save, count = workspace.save, 0

            def stop(name: str, tensors: dict[str, Tensor], save: Callable[..., None] = save) -> None:
                nonlocal count
                count += 1
                if count == 3:
                    raise KeyboardInterrupt
                save(name, tensors)

            workspace.save = stop  # type: ignore[method-assign]
            try:
                solve_final(stream, windows_NT, workspace, plan, oriented(stream), shapes, "final", {})
            except KeyboardInterrupt:
                workspace.save = save  # type: ignore[method-assign]
            assert count == 3
        files = solve_final(stream, windows_NT, workspace, plan, oriented(stream), shapes, "final", {})
        found.append({name: load_coded(workspace, file, name, "int4-g32", shapes[name]).decode()
                      for name, file in files.items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
