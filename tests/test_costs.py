"""What formats cost when they run: the sum by hand, plans that are measured until they hold, and the stock runtime itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum import Budget, costs, optimize
from supremum.allocate import Allowance, Option, Unit, choose
from supremum.checkpoint.targets import target
from supremum.costs import Costs, Rate, Step, check_runtime, reached_lines
from supremum.errors import BudgetError

ORIGINAL = Step(0.010, 1_000_000)
RATES = {(False, "a"): Rate(-2e-9, -1.0), (False, "b"): Rate(1e-9, -1.5), (True, "a"): Rate(-4e-9, -0.5)}


def made(step: Any = None) -> Costs:
    return Costs(ORIGINAL, "llama_cpp", 256, RATES, {"embed", "head"}, "head", step)


def test_a_format_costs_what_its_weights_cost() -> None:
    found = made()
    assert found.of("w", "a", 1000) == (pytest.approx(-2e-6), -1000) and found.of("w", "b", 1000)[1] == -1500
    assert found.of("head", "a", 1000) == (pytest.approx(-4e-6), -500)
    assert found.of("embed", "a", 1000) == (0.0, -500)  # one row a token: no time, but it is held


def test_speed_and_memory_as_what_may_be_added() -> None:
    found = made()
    assert found.allowance(Budget(speed="2x")) == Allowance(pytest.approx(-0.005), None)
    assert found.allowance(Budget(speed="50", memory=900_000)) == Allowance(pytest.approx(0.010), -100_000)
    assert found.allowance(Budget(memory=10**6)) == Allowance(None, 0)


options = st.builds(Option, st.sampled_from("abc"), st.integers(1, 60), st.floats(1e-7, 3.0),
                    st.integers(-9, 9).map(lambda n: n / 1024), st.integers(-9, 9))
units = st.lists(st.builds(lambda those: Unit(("t",), 8, True, tuple(those)), st.lists(options, min_size=1, max_size=4)),
                 min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(units=units, seconds=st.one_of(st.none(), st.integers(-30, 30)), resident=st.one_of(st.none(), st.integers(-30, 30)),
       size=st.one_of(st.none(), st.integers(5, 200)))
def test_the_best_choice_within_all_budgets_at_once(units: list[Unit], seconds: int | None, resident: int | None,
                                                    size: int | None) -> None:
    """Against every choice there is."""
    allowed = Allowance(None if seconds is None else seconds / 1024, resident)

    def fits(choice: Any) -> bool:
        return ((size is None or sum(o.nbytes for o in choice) <= size)
                and (resident is None or sum(o.resident for o in choice) <= resident)
                and (seconds is None or sum(o.seconds for o in choice) * 1024 <= seconds))

    possible = [c for c in itertools.product(*(unit.options for unit in units)) if fits(c)]
    if not possible:
        with pytest.raises(BudgetError):
            choose(units, size=size, allowance=allowed)
        return
    found = choose(units, size=size, allowance=allowed)
    assert fits(found)
    assert sum(o.nats for o in found) <= min(sum(o.nats for o in c) for c in possible) * (1 + 1.1e-4) + 1e-9


def layers(count: int = 8) -> list[Unit]:
    """A layer is as it is, or small and fast at one nat, or smaller and slower at half."""
    return [Unit((f"{i}",), 1, True, (Option("fast", 50, 1.0 + i / 100, -1e-3, -50), Option("slow", 40, 0.5, 1e-3, -60),
                                      Option(None, 100, 0.0))) for i in range(count)]


@pytest.mark.parametrize(("truth", "asked"), [(1.0, 3), (0.7, 4), (0.5, 6)])
def test_a_plan_that_is_slower_than_predicted_is_made_again(truth: float, asked: int) -> None:
    """`truth`: what a fast layer really saves of what the rates say. Three milliseconds must be saved."""
    seen = []

    def step(plan: Mapping[str, str], name: str) -> Step:
        seen.append(name)
        return Step(0.010 - truth * 1e-3 * list(plan.values()).count("fast"), 1_000_000)

    def spend(allowance: Allowance) -> list[Option]:
        return choose(layers(), allowance=allowance)

    chosen = made(step).settle(Budget(speed="142.857"), layers(), spend, "here")
    fast = sum(option.codec == "fast" for option in chosen)
    assert asked <= fast <= asked + 1 and 0.010 - truth * 1e-3 * fast <= 0.007 * costs.NEAR
    assert seen == [f"here/step{i}" for i in range(len(seen))] and (len(seen) == 1) == (truth == 1)


def test_a_plan_that_never_holds_is_refused_with_what_it_took() -> None:
    never = made(lambda plan, name: Step(0.010, 1_100_000))
    with pytest.raises(BudgetError, match=r"the last took 10\.00 ms a step and 1\.10 MB"):
        never.settle(Budget(memory=1_050_000), layers(), lambda allowance: [unit.options[-1] for unit in layers()], "here")


def test_what_no_plan_can_reach_is_refused_with_the_best_there_is() -> None:
    found = made()
    with pytest.raises(BudgetError, match=r"999 KB of memory is too little: llama\.cpp takes at least 1\.00 MB .* "
                                          r"256 tokens.*--memory 999520 or"):
        found.check(Budget(memory=999_000), layers())
    with pytest.raises(BudgetError, match=r"6x is out of reach.*about 500 tokens/s at most, 5\.00 times the original's 100"
                                          r".*--speed 5\.0x or less"):
        found.check(Budget(speed="6x"), layers())
    found.check(Budget(speed="499", memory=999_520), layers())


def test_a_runtime_that_decodes_as_it_loads_is_named() -> None:
    for name in ("compressed-tensors", "archive"):
        with pytest.raises(BudgetError, match=r"stock Transformers decodes the weights.*no plan takes less.*--target gguf"):
            check_runtime(Budget(bits=4, memory=10**9), target(name))
        check_runtime(Budget(bits=4), target(name))
    check_runtime(Budget(speed="2x"), target("gguf"))
    for budget in (Budget(memory=10**9), Budget(speed="2x")):  # costs knows neither its layout nor its engine
        with pytest.raises(BudgetError, match=r"measured in llama\.cpp; GPTQModel runs the gptq target.*--target gguf"):
            check_runtime(budget, target("gptq"))
    check_runtime(Budget(bits=4), target("gptq"))


def test_what_is_reached_is_said_in_words() -> None:
    lines = reached_lines(Budget(memory=900_000, speed="2x"), made(), ORIGINAL, Step(0.006, 899_000))
    assert [(line["name"], line["asked"], line["reached"], line["held"]) for line in lines] == [
        ("memory", "900 KB", "899 KB", True), ("speed", "2x", "167 tokens/s", False)]
    assert lines[1]["note"].startswith("1.67 times the original's")


@pytest.mark.parametrize(("speed", "seconds"), [("2x", 0.005), ("0.5x", 0.02), ("250", 0.004), (None, None)])
def test_a_speed_is_a_step(speed: str | None, seconds: float | None) -> None:
    assert Budget(size=1, speed=speed).step_seconds(0.01) == (pytest.approx(seconds) if seconds else None)


@pytest.mark.parametrize("speed", ["", "x", "fast", "0", "-2x", "nan", "inf"])
def test_what_is_no_speed_is_refused(speed: str) -> None:
    with pytest.raises(BudgetError, match="speed"):
        Budget(speed=speed)


def test_memory_and_speed_end_to_end_in_llama_cpp(tiny_model: Any, tmp_path: Path) -> None:
    """With the stock runtime's own figures; what they are depends on who else uses the machine."""
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"The river carries {i} stones past the bridge at {i % 24} o'clock." for i in range(3000)))
    model = tiny_model("llama")
    result = optimize(model, Budget(memory=10**9, speed="0.001x", bits=6), text=[str(text)], tokens=512, out=tmp_path / "out",
                      dtype="float32", only=["Q4_0", "Q8_0"])
    running = result.document["result"]["running"]
    assert [line["name"] for line in running] == ["memory", "speed"] and all(line["held"] for line in running)
    assert "--memory 1000000000 --speed 0.001x" in result.document["command"]
    assert "of memory and speed 0.001x" in (tmp_path / "out" / "README.md").read_text()
