"""Plans: what may be chosen, what staying as it is costs, and budgets that hold by the target's own exact size."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum import codecs
from supremum.allocate import Budget, Option, Unit
from supremum.errors import BudgetError
from supremum.planning import (
    Menu,
    block_rate,
    fixed_bytes,
    menu_of,
    offered,
    only_plan,
    plan_of,
    reason,
    spend,
    units_of,
)

from .test_pipeline import text  # noqa: F401  (a fixture)

SHAPES = {"b.0.q": (64, 64), "b.0.k": (32, 64), "b.0.o": (64, 32), "embed": (100, 64)}


class Fake:
    """A target whose size is no sum: every codec in use costs a table, and the whole is padded to pages."""

    name = "gguf"
    menu: tuple[str, ...] = ("Q2_K", "MXFP4", "Q8_0")
    least: tuple[str, ...] = ()
    resident = True

    def __init__(self, page: int = 1, table: int = 0, held: Mapping[str, list[str]] | None = None,
                 ties: list[list[str]] | None = None) -> None:
        self.page, self.table, self.held, self.tied = page, table, held or {}, ties or []
        self.options: dict[tuple[str, str | None], int] = {}

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        return self.held.get(name, [])

    def ties(self, checkpoint: Any) -> list[list[str]]:
        return self.tied

    def together(self, names: Collection[str]) -> None: ...

    def size(self, checkpoint: Any, plan: Mapping[str, str]) -> int:
        tensors = sorted({name for name, _ in self.options})
        total = 1000 + sum(self.options[name, plan.get(name)] for name in tensors) + self.table * len(set(plan.values()))
        return -(-total // self.page) * self.page


def units(target: Fake, options: list[list[tuple[int, float]]]) -> list[Unit]:
    """Units of one tensor each, the last one a table; what is left as it is takes 100 bytes and loses nothing."""
    made = []
    for i, sizes in enumerate(options):
        name, kinds = str(i), []
        for k, (nbytes, nats) in enumerate(sizes):
            target.options[name, f"c{k}"] = nbytes
            kinds.append(Option(f"c{k}", nbytes, nats))
        target.options[name, None] = 100
        made.append(Unit((name,), 10, i + 1 < len(options), (*kinds, Option(None, 100, 0.0))))
    return made


sizes = st.lists(st.tuples(st.integers(1, 90), st.floats(0.001, 2)), min_size=1, max_size=3)
choices = st.lists(sizes, min_size=2, max_size=4)


@settings(max_examples=100, deadline=None)
@given(options=choices, page=st.sampled_from([1, 32, 100]), table=st.sampled_from([0, 7, 60]), extra=st.integers(-5, 450))
def test_the_exact_size_never_exceeds_the_budget(options: list[list[tuple[int, float]]], page: int, table: int,
                                                 extra: int) -> None:
    target = Fake(page, table)
    made = units(target, options)
    sizes = [target.size(None, plan_of(made, choice)) for choice in itertools.product(*(unit.options for unit in made))]
    budget = min(sizes) + extra
    try:
        chosen = spend(Budget(size=budget), made, None, target)  # type: ignore[arg-type]
    except BudgetError:
        assert extra < page + 4 * table  # refused only where pages and tables take what the bytes alone would fit
        return
    assert all(option in unit.options for unit, option in zip(made, chosen, strict=True))
    assert target.size(None, plan_of(made, chosen)) <= budget
    if page == 1 and table == 0:
        best = min(sum(o.nats for o in choice) for choice in itertools.product(*(unit.options for unit in made))
                   if target.size(None, plan_of(made, choice)) <= budget)
        assert sum(o.nats for o in chosen) <= best * (1 + 1.1e-4) + 1e-12


@settings(max_examples=200, deadline=None)
@given(options=choices, extra=st.integers(-1, 60), bits=st.booleans())
def test_the_only_plan_is_the_only_one(options: list[list[tuple[int, float]]], extra: int, bits: bool) -> None:
    """The table kept: exactly where one combination fits, and it is that one."""
    target = Fake()
    made = units(target, options)
    made[-1] = Unit(made[-1].tensors, made[-1].weights, False, made[-1].options[-1:])
    every = list(itertools.product(*(unit.options for unit in made)))
    sizes = [target.size(None, plan_of(made, choice)) for choice in every]
    blocks = min(sizes) - 1100 + extra  # their bytes beside the header's and the table's
    budget = Budget(bits=8 * blocks / sum(unit.weights for unit in made[:-1])) if bits else Budget(size=min(sizes) + extra)
    if extra < 0:
        with pytest.raises(BudgetError):
            only_plan(budget, made, None, target)  # type: ignore[arg-type]
        return
    fits = [list(choice) for choice, size in zip(every, sizes, strict=True) if size <= min(sizes) + extra]
    found = only_plan(budget, made, None, target)  # type: ignore[arg-type]
    assert found == (fits[0] if len(fits) == 1 else None)


def test_there_is_a_choice_where_a_table_may_be_coded_or_a_kl_is_asked() -> None:
    target = Fake()
    made = units(target, [[(50, 0.1)], [(40, 0.1)]])
    assert only_plan(Budget(size=1090), made, None, target) is None  # type: ignore[arg-type]
    made[-1] = Unit(made[-1].tensors, made[-1].weights, False, made[-1].options[-1:])
    assert only_plan(Budget(size=1150), made, None, target) == [made[0].options[0], made[1].options[0]]  # type: ignore[arg-type]
    assert only_plan(Budget(size=1150, max_kl=0.1), made, None, target) is None  # type: ignore[arg-type]


def test_what_is_refused_names_what_would_do() -> None:
    target = Fake()
    made = units(target, [[(50, 0.1), (20, 1.0)], [(40, 0.1)]])
    with pytest.raises(BudgetError, match=r"smallest gguf file .* 1\.06 KB \(1060 bytes\).*--size 1060 or") as e:
        spend(Budget(size=1059), made, None, target)  # type: ignore[arg-type]
    assert "1.06 KB is too small" in e.value.cause
    assert plan_of(made, spend(Budget(size=1060), made, None, target)) == {"0": "c1", "1": "c0"}  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"the least to be had is 16\.000.*--bits 16\.0 or"):
        spend(Budget(bits=15.9), made, None, target)  # type: ignore[arg-type]
    assert plan_of(made, spend(Budget(bits=16), made, None, target))["0"] == "c1"  # type: ignore[arg-type]


def test_bits_limit_the_blocks_and_the_table_follows_their_price() -> None:
    """The blocks' last byte is worth 0.9 / 30 nats; the table takes what pays at that price, and no more."""
    target = Fake()
    made = units(target, [[(50, 0.1), (20, 1.0)], [(30, 3.0), (60, 0.2), (90, 0.19)]])
    chosen = spend(Budget(bits=40), made, None, target)  # type: ignore[arg-type]
    assert [option.codec for option in chosen] == ["c0", "c1"]


def test_least_bytes_for_a_predicted_damage() -> None:
    target = Fake()
    made = units(target, [[(50, 0.1), (20, 1.0)], [(40, 0.1), (30, 0.3)]])
    chosen = spend(Budget(max_kl=0.5), made, None, target, nats=0.45)  # type: ignore[arg-type]
    assert [option.codec for option in chosen] == ["c0", "c1"]
    with pytest.raises(BudgetError):
        spend(Budget(size=1060, max_kl=0.5), made, None, target, nats=0.45)  # type: ignore[arg-type]


def test_fixed_bytes_are_what_no_choice_changes() -> None:
    target = Fake()
    assert fixed_bytes(None, target, units(target, [[(50, 0.1)], [(40, 0.1)]])) == 1000  # type: ignore[arg-type]


def test_menu_keeps_the_target_s_order_and_what_was_asked() -> None:
    target = Fake(held={"b.0.q": ["Q8_0", "MXFP4", "Q2_K", "other"], "b.0.k": ["Q8_0"], "b.0.o": [], "embed": ["Q8_0"]},
                  ties=[["b.0.q", "b.0.k"], ["b.0.o", "embed"]])
    menu = menu_of(target, None, SHAPES, [])  # type: ignore[arg-type]
    assert menu.codecs == {"b.0.q": ["Q2_K", "MXFP4", "Q8_0"], "b.0.k": ["Q8_0"], "b.0.o": [], "embed": ["Q8_0"]}
    assert menu.ties == [["b.0.q", "b.0.k"]]  # a tie with what has no format is none
    kept = menu_of(target, None, SHAPES, ["0.k", "emb"], ["Q8_0", "other"])  # type: ignore[arg-type]
    assert kept.codecs == {"b.0.q": ["Q8_0", "other"], "b.0.k": [], "b.0.o": [], "embed": []} and kept.ties == []


def test_the_least_codecs_are_offered_where_a_budget_cannot_be_met_without() -> None:
    target = Fake(held={name: ["IQ2_XXS", "Q2_K"] for name in SHAPES})
    target.least = ("IQ2_XXS",)
    assert set(map(tuple, menu_of(target, None, SHAPES, []).codecs.values())) == {("Q2_K",)}  # type: ignore[arg-type]
    widest = menu_of(target, None, SHAPES, [], least=True)  # type: ignore[arg-type]
    assert set(map(tuple, widest.codecs.values())) == {("Q2_K", "IQ2_XXS")}
    target.least = ("c0",)
    made = units(target, [[(20, 0.5), (50, 0.1)], [(20, 0.5), (50, 0.1)]])
    for size, count in ((1099, 3), (1100, 2)):
        found = offered(Budget(size=size), made, None, target)  # type: ignore[arg-type]
        assert [len(unit.options) for unit in found] == [count, count]


def test_one_group_size_of_the_integers_is_taken() -> None:
    every = ["int4-g64", "int4-g32", "int8-g32", "int4-channel", "int8-g64"]
    target = Fake(held={"b.0.q": every, "b.0.o": ["int4-g32", "int8-g32"]})
    target.menu = ("int4-g64", "int8-g64", "int4-g32", "int8-g32", "int4-channel")
    menu = menu_of(target, None, SHAPES, [])  # type: ignore[arg-type]
    assert menu.codecs["b.0.q"] == ["int4-g64", "int8-g64"] and menu.codecs["b.0.o"] == ["int4-g32", "int8-g32"]
    asked = menu_of(target, None, SHAPES, [], ["int4-g32", "int4-g64"])  # type: ignore[arg-type]
    assert asked.codecs["b.0.q"] == ["int4-g32", "int4-g64"]


class Real(Fake):
    """Sizes of real codecs; what stays takes two bytes a weight."""

    def size(self, checkpoint: Any, plan: Mapping[str, str]) -> int:
        return 5000 + sum(codecs.get(plan[name]).nbytes(shape) if name in plan else 2 * shape[0] * shape[1]
                          for name, shape in SHAPES.items())


def test_units_have_real_bytes_and_ties_move_together() -> None:
    menu = Menu({"b.0.q": ["int4-g64", "int8-g64"], "b.0.k": ["int2-g64", "int8-g64", "int4-g64"], "b.0.o": ["int4-g32"],
                 "embed": []}, [["b.0.q", "b.0.k"]])
    nats = {(name, codec): len(codec) + i for i, (name, names) in enumerate(menu.codecs.items()) for codec in names}
    checkpoint: Any = SimpleNamespace(tensors={"embed": SimpleNamespace(nbytes=2 * 6400)})
    tied, alone, kept = units_of(checkpoint, Real(), menu, SHAPES, ["embed"], nats)
    assert tied.tensors == ("b.0.q", "b.0.k") and tied.in_blocks and tied.weights == 96 * 64
    assert [o.codec for o in tied.options] == ["int4-g64", "int8-g64", None]
    assert tied.options[0] == Option("int4-g64", sum(codecs.get("int4-g64").nbytes((n, 64)) for n in (64, 32)), 8 + 9)
    assert tied.options[-1] == Option(None, 2 * 96 * 64, 0.0)
    assert alone.tensors == ("b.0.o",) and [o.codec for o in alone.options] == ["int4-g32", None]
    assert kept == Unit(("embed",), 6400, False, (Option(None, 2 * 6400, 0.0),))
    assert fixed_bytes(checkpoint, Real(), [tied, alone, kept]) == 5000
    chosen = [tied.options[0], alone.options[-1], kept.options[0]]
    assert plan_of([tied, alone, kept], chosen) == {"b.0.q": "int4-g64", "b.0.k": "int4-g64"}
    weights, bits = block_rate([tied, alone, kept], chosen)
    assert weights == 96 * 64 + 64 * 32 and bits == 8 * (tied.options[0].nbytes + 2 * 64 * 32) / weights


def test_kept_layers_count_at_the_bytes_the_target_gives_them() -> None:
    """Kept by the user: measured by what the file would save; without any format: as the checkpoint holds it."""
    checkpoint: Any = SimpleNamespace(tensors={"b.0.k": SimpleNamespace(nbytes=77)})
    target = Real(held={"b.0.q": ["int4-g64"], "b.0.o": ["int4-g32"], "embed": ["int8-g64"]})
    menu = Menu({"b.0.q": ["int4-g64"], "b.0.k": [], "b.0.o": [], "embed": ["int8-g64"]}, [])
    units = {unit.tensors[0]: unit for unit in units_of(checkpoint, target, menu, SHAPES, ["embed"])}
    assert units["b.0.o"].options == (Option(None, 2 * 64 * 32, 0.0),) and units["b.0.o"].in_blocks
    assert units["b.0.k"].options == (Option(None, 77, 0.0),)


def test_a_tie_without_a_common_codec_stays() -> None:
    menu = Menu({"b.0.q": ["int4-g64"], "b.0.k": ["int8-g64"]}, [["b.0.q", "b.0.k"]])
    tied, = units_of(None, Real(), menu, SHAPES, [])  # type: ignore[arg-type]
    assert tied.options == (Option(None, 2 * 96 * 64, 0.0),)


def test_reasons_name_the_neighbours() -> None:
    options = Option("a", 1000, 1.0), Option("b", 2000, 0.5), Option("c", 4000, 0.1), Option(None, 9000, 0.0)
    one = Unit(("w",), 10, True, options)
    assert reason(one, one.options[1]) == "a would save 1.00 KB for +0.5 nats; c would cost 2.00 KB for -0.4 nats"
    assert reason(one, one.options[0]) == "b would cost 1.00 KB for -0.5 nats"
    assert reason(one, one.options[3]) == "c would save 5.00 KB for +0.1 nats"
    assert reason(one, one.options[2]).endswith("as it is would cost 5.00 KB for -0.1 nats")
    kept = Unit(("w",), 1, True, (one.options[3],))
    assert reason(kept, kept.options[0]) == "stays as it is: kept, or in no format that this target has"
