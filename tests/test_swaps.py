"""The search by true KL: what is tried, what is accepted, and that kept hidden states change nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum import optimize, swaps
from supremum.allocate import Budget, Option, Unit
from supremum.job import lay_out, open_job
from supremum.measure.streamed import streamed_quality
from supremum.pipeline import Statistics, _reached, statistics
from supremum.planning import plan_of
from supremum.swaps import falls, proposals, search, swap, wanted, within
from supremum.workspace import Workspace


def unit(name: str, *options: tuple[int, float]) -> Unit:
    return Unit((name,), 100, True, tuple(Option(f"c{size}", size, nats) for size, nats in options))


def test_a_fall_must_exceed_its_standard_error() -> None:
    """Differences -0.2, -0.1, 0: mean -0.1, standard deviation 0.1, error 0.1 / sqrt(3) = 0.0577. With -0.3, 0, 0: error
    0.1, mean -0.1, not below."""
    assert falls([1.0, 1.0, 1.0], [0.8, 0.9, 1.0])
    assert not falls([1.0, 1.0, 1.0], [0.701, 1.0, 1.0])
    assert not falls([1.0, 1.0], [1.2, 1.1]) and not falls([1.0], [0.1]) and not falls([1.0, 2.0], [1.0, 2.0])
    assert falls([5.0, 1.0], [4.9, 0.9])  # paired: the windows' own spread does not count


three = unit("a", (10, 3.0), (20, 1.0), (40, 0.1)), unit("b", (10, 0.5), (20, 0.2)), unit("c", (12, 0.9), (20, 0.6))


def test_the_best_predicted_swap_comes_first_and_none_twice() -> None:
    chosen = [three[0].options[0], three[1].options[1], three[2].options[1]]
    found = list(proposals(three, chosen, []))
    assert found == [(0, 1, 1, 0)]  # c gives up 8 bytes for 10
    assert list(proposals(three, chosen, [], slack=2)) == [(0, 1, 1, 0), (0, 1, 2, 0)]  # equal gains, in order
    again = list(proposals(three, chosen, [(0, 1, 1, 0, False)], slack=2))
    assert again == [(0, 1, 2, 0)]


def test_moves_that_were_rejected_wait() -> None:
    """b's step down is the better predicted, and was rejected with another partner."""
    four = (*three, unit("d", (10, 2.9), (20, 1.0)))
    chosen = [three[0].options[0], three[1].options[1], three[2].options[1], four[3].options[0]]
    first = next(proposals(four, chosen, [], slack=2))
    assert first == (0, 1, 1, 0)
    assert next(proposals(four, chosen, [(*first, False)], slack=2)) == (3, 1, 2, 0)


sizes = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 3)), min_size=1, max_size=4, unique_by=lambda pair: pair[0])


@settings(max_examples=100, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=5), st.integers(0, 20), st.data())
def test_a_swap_is_one_up_and_another_down_within_the_slack(made: list[Any], slack: int, data: Any) -> None:
    units = [unit(str(i), *options) for i, options in enumerate(made)]
    chosen = [data.draw(st.sampled_from(u.options)) for u in units]
    gains = []
    for u, i, v, j in proposals(units, chosen, [], slack):
        up, down = units[u].options[i], units[v].options[j]
        assert u != v and up.nbytes > chosen[u].nbytes and up.nats < chosen[u].nats and down.nbytes < chosen[v].nbytes
        assert up.nbytes - chosen[u].nbytes + down.nbytes - chosen[v].nbytes <= slack
        gains.append((up.nats - chosen[u].nats) + (down.nats - chosen[v].nats))  # summed as they are sorted
    assert gains == sorted(gains)


def test_a_plan_may_not_take_more_of_anything() -> None:
    units = [Unit(("a",), 100, True, (Option("x", 50, 1.0, 1e-3, 5), Option("y", 60, 0.5, 2e-3, 4),
                                      Option("z", 55, 0.5, 1e-3, 6)))]

    def size(plan: Any) -> int:
        return next(option.nbytes for option in units[0].options if option.codec == plan["a"])

    now = [units[0].options[0]]
    assert within(units, now, Budget(size=70), size)(now)
    slower, larger = [units[0].options[1]], [units[0].options[2]]
    assert not within(units, now, Budget(size=70), size)(slower) and not within(units, now, Budget(size=70), size)(larger)
    plain = [replace(units[0], options=tuple(replace(o, seconds=0.0, resident=0) for o in units[0].options))]
    first, second, _ = ([option] for option in plain[0].options)
    assert within(plain, first, Budget(size=60), size)(second) and not within(plain, first, Budget(size=59), size)(second)
    assert not within(plain, first, Budget(bits=9), size)(second)  # without a size: no larger than it was
    assert not within(plain, first, Budget(size=60, max_kl=1.0), size)(second)  # the smallest is wanted, not the size filled
    assert not within(plain, first, Budget(size=60, bits=4.7), size)(second)


def test_it_is_wanted_at_few_bits_or_much_damage() -> None:
    few, many = unit("a", (37, 0.1)), unit("a", (38, 0.1))
    assert wanted([few], few.options, 0.01) and not wanted([many], many.options, 0.01)  # 2.96 and 3.04 bits
    assert wanted([many], many.options, 0.21)


@pytest.fixture(scope="module")
def found(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """A tiny Llama with two formats, priced as if all damage were the same."""
    folder = tmp_path_factory.mktemp("swaps")
    (folder / "notes.txt").write_text("\n\n".join(f"The river carries {i} stones past the bridge at {i % 24} o'clock."
                                                   for i in range(4000)))
    job = open_job(tiny_model("llama"), folder / "out", target="gguf", text=[str(folder / "notes.txt")], tokens=512,
                   keep=None, only=["Q4_0", "Q8_0"], seed=0, dtype="float32")
    stats = statistics(job, lay_out(job), Workspace(folder / "work", {}))
    blind = {"Q4_0": 1.0, "Q8_0": 0.1}
    stats.units = [replace(unit, options=tuple(replace(o, nats=blind[o.codec]) for o in unit.options if o.codec))
                   for unit in stats.units]
    return stats


def start(found: Statistics) -> list[Option]:
    """Every other matrix in the larger format."""
    return [unit.options[i % 2] for i, unit in enumerate(found.units)]


def go(found: Statistics, chosen: list[Option], folder: str) -> tuple[list[Option], dict[str, Any] | None]:
    kind, checkpoint = found.job.kind, found.job.checkpoint
    fits = within(found.units, chosen, Budget(bits=16), lambda plan: kind.size(checkpoint, plan))
    assert found.candidates is not None
    return search(found.gathered, found.units, chosen, found.candidates, found.reference, fits, folder)


def true_kl(found: Statistics, chosen: list[Option]) -> float:
    plan = plan_of(found.units, chosen)
    assert found.candidates is not None
    candidates = found.candidates
    quality = streamed_quality(found.gathered.stream, found.gathered.held_out, found.reference,
                               lambda name: candidates.get(name, plan[name]).decode() if name in plan else None)
    assert quality.kl_mean is not None
    return quality.kl_mean


def test_the_search_lowers_the_true_kl_within_the_bytes(found: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "HIGH_KL", 0.0)
    chosen = start(found)
    after, report = go(found, chosen, "whole")
    assert report is not None and 0 < report["accepted"] <= report["trials"] <= swaps.TRIALS
    assert sum(o.nbytes for o in after) <= sum(o.nbytes for o in chosen)
    assert report["kl_before"] == pytest.approx(true_kl(found, chosen), rel=1e-6)
    assert report["kl_after"] == pytest.approx(true_kl(found, after), rel=1e-6)  # kept states change nothing
    assert report["kl_after"] < 0.97 * report["kl_before"] and report["seconds"] > 0
    assert not found.gathered.workspace.has("whole/now")


def test_what_was_accepted_is_under_what_is_tried_next(found: Statistics) -> None:
    """A change in the first block, kept, then one in the last: against a run of the whole; then one that is not kept."""
    def moved(options: list[Option], part: str) -> tuple[list[Option], list[str]]:
        place = next(i for i, unit in enumerate(found.units) if part in unit.tensors[0])
        other = next(o for o in found.units[place].options if o is not options[place])
        return [*options[:place], other, *options[place + 1:]], list(found.units[place].tensors)

    assert found.candidates is not None
    states = swaps._States(found.gathered, found.candidates, found.reference, "states")
    plan = start(found)
    states.start(plan_of(found.units, plan))
    for part, accepted in (("layers.0.mlp.up", True), ("layers.1.mlp.down", True), ("layers.0.self_attn.q", False),
                           ("layers.1.self_attn.o", True), ("embed_tokens", True), ("layers.1.mlp.gate", True),
                           ("lm_head", True)):
        tried, changed = moved(plan, part)
        kl = states.attempt(plan_of(found.units, tried), changed)
        assert sum(kl) / len(kl) == pytest.approx(true_kl(found, tried), rel=1e-6), part
        states.settle(accepted)
        plan = tried if accepted else plan
    states.drop()


def test_a_killed_search_goes_on_to_the_same_plan(found: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "HIGH_KL", 0.0)
    monkeypatch.setattr(swaps, "TRIALS", 8)
    whole, report = go(found, start(found), "uninterrupted")
    attempt, count = swaps._States.attempt, iter(range(100))

    def killed(*args: Any) -> Any:
        if next(count) == 4:
            raise KeyboardInterrupt
        return attempt(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(swaps._States, "attempt", killed)
        go(found, start(found), "killed")
    log = json.loads((found.gathered.workspace.folder / "killed" / "log.json").read_text())
    assert len(log["trials"]) == 4
    resumed, again = go(found, start(found), "killed")
    assert resumed == whole and again is not None and report is not None
    assert [again[key] for key in ("trials", "accepted")] == [report[key] for key in ("trials", "accepted")]
    assert again["kl_after"] == report["kl_after"] and math.isfinite(again["seconds"])
    monkeypatch.setattr(swaps._States, "start", None)
    assert go(found, start(found), "killed") == (resumed, again)  # finished: nothing is run


def test_a_plan_that_measures_well_is_left_alone(found: Statistics) -> None:
    chosen = [unit.options[-1] for unit in found.units]
    assert go(found, chosen, "well") == (chosen, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swaps._States, "start", None)  # which was measured is not measured again
        assert go(found, chosen, "well") == (chosen, None)
    assert Path(found.gathered.workspace.folder / "well" / "log.json").exists()


def test_where_nothing_can_be_swapped_nothing_is_measured(found: Statistics) -> None:
    assert found.candidates is not None
    budget, chosen = Budget(bits=2.5), [unit.options[0] for unit in found.units]  # the least of all: only up
    done = swap(found.gathered, found.job.kind, budget, found.units, chosen, found.candidates, found.reference, 1.0, "none")
    assert done == (chosen, None) and not (found.gathered.workspace.folder / "none").exists()


def test_a_largest_kl_below_three_bits_is_kept_by_a_searched_plan(tiny_model: Any, tmp_path: Path) -> None:
    """Of real layers, with all stages."""
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"The river carries {i} stones past the bridge at {i % 24} o'clock." for i in range(3000)))
    job = open_job(tiny_model("llama"), tmp_path / "out", target="compressed-tensors", text=[str(text)], tokens=512,
                   keep=None, only=None, seed=0, dtype="float32")
    found, budget = statistics(job, lay_out(job), Workspace(tmp_path / "work", {})), Budget(max_kl=0.1)
    reached = _reached(found, budget)
    bits, kl = reached.point() or (8.0, 1.0)
    assert bits < 3 and kl <= 0.1 and reached.swaps is not None and reached.swaps["trials"] > 0
    again = _reached(found, budget)  # finished: from what the workspace holds
    assert again.chosen == reached.chosen and again.swaps == reached.swaps and again.size == reached.size


def test_below_three_bits_a_run_searches_and_says_what_it_bought(tiny_model: Any, tmp_path: Path) -> None:
    """Of a target that ties projections: they move together."""
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"The river carries {i} stones past the bridge at {i % 24} o'clock." for i in range(3000)))
    result = optimize(tiny_model("llama"), Budget(bits=2.7), target="compressed-tensors", text=[str(text)], tokens=512,
                      out=tmp_path / "out", dtype="float32").document
    found, said = result["result"]["swaps"], (tmp_path / "out" / "README.md").read_text()
    assert found is not None and found["trials"] > 0 and found["kl_after"] <= found["kl_before"]
    assert result["result"]["bits_per_weight"] <= 2.7 and result["proof"]["passed"]
    codecs = {layer["name"].removeprefix("model.layers."): layer["codec"] for layer in result["plan"]}
    for block in ("0", "1"):
        assert len({codecs[f"{block}.self_attn.{name}_proj.weight"] for name in "qkv"}) == 1
        assert len({codecs[f"{block}.mlp.{name}_proj.weight"] for name in ("gate", "up")}) == 1
    assert f"{found['accepted']} of {found['trials']} tried" in said
    assert ("flatters the KL" in said) == (found["accepted"] > 0) and "neither memory nor time" in said
