"""Before any work is done: what is offered for a budget, and which refusal comes first."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supremum.allocate import Budget
from supremum.errors import BudgetError, SupremumError
from supremum.job import bit_range, check, lay_out, open_job

TinyModel = Callable[..., Path]


def opened(model: Path, folder: Path, text: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"target": "gguf", "text": [str(text)], "tokens": 1024, "keep": None, "only": None, "seed": 0,
                             "dtype": "float32"}
    return open_job(model, folder, **(given | options))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words of a text " * 500)
    return tmp_path / "text.txt"


def test_the_least_types_are_offered_for_a_size_or_bits_alone(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    job = opened(tiny_model("llama", hidden_size=256, intermediate_size=512), tmp_path / "out", text)
    usual = lay_out(job)
    assert "IQ1_S" not in str(usual.menu) and "IQ1_S" in str(usual.widest)
    cases = (Budget(bits=4), False), (Budget(bits=2), True), (Budget(max_kl=0.5), False), (Budget(size=1), True)
    for budget, offered in cases:
        assert (lay_out(job, [budget]).menu == usual.widest) == offered, budget
    assert lay_out(job, [Budget(bits=4), Budget(bits=2)]).menu == usual.widest
    least, most = bit_range(job, usual, usual.widest)
    assert 1.5 < least < 2 < bit_range(job, usual, usual.menu)[0] < 4 < most
    with pytest.raises(BudgetError, match=f"the least to be had is {least:.3f}"):
        check(job, lay_out(job, [Budget(bits=1)]), [Budget(bits=1)], tmp_path / "out")


def test_a_model_that_keeps_everything_is_told_so(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    job = opened(tiny_model("llama"), tmp_path / "out", text, target="compressed-tensors", keep=["."])
    with pytest.raises(SupremumError, match="has no format for any of its layers"):
        check(job, lay_out(job, [Budget(bits=4)]), [Budget(bits=4)], tmp_path / "out")


def test_a_kept_name_that_no_tensor_has_is_refused(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    job = opened(tiny_model("llama"), tmp_path / "out", text, keep=["v_proj", "lm_hat"])
    with pytest.raises(SupremumError, match=r"--keep lm_hat: no tensor of .* model\.embed_tokens\.weight"):
        lay_out(job)


def test_a_refusal_names_the_options_that_are_its_reason(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for options, said in (({}, r"another --target\.$"), ({"only": ["Q8_0"]}, r"leave out --only\.$"),
                          ({"only": ["Q8_0"], "keep": ["v_proj"]}, r"leave out --only and --keep\.$")):
        job = opened(model, tmp_path / "out", text, **options)
        with pytest.raises(BudgetError, match=said):
            check(job, lay_out(job, [Budget(bits=2)]), [Budget(bits=2)], tmp_path / "out")


def test_an_archive_of_an_impossible_size_is_refused_at_once(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    job = opened(tiny_model("llama"), tmp_path / "out", text, target="archive")
    with pytest.raises(BudgetError, match=r"too small.*--size \d+ or more") as refused:
        check(job, lay_out(job), [Budget(size=10_000)], tmp_path / "out")
    least = int(refused.value.remedy.split("--size ")[1].split()[0])
    check(job, lay_out(job), [Budget(size=least)], tmp_path / "out")


def test_a_plan_that_changes_nothing_is_no_result(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    """Of a file in Q4_0, what is kept is smaller than the only format that is left."""
    from supremum.pipeline import optimize

    draw, various = random.Random(0), tmp_path / "various.txt"
    various.write_text(" ".join(f"{draw.randrange(10**6)}" for _ in range(20_000)))
    out = optimize(tiny_model("llama"), Budget(bits=4.6), text=[str(various)], tokens=512, only=["Q4_0"],
                   keep=["embed", "lm_head"], quick=True, out=tmp_path / "q4", dtype="float32").folder
    job = opened(out, tmp_path / "out", text, only=["Q8_0"], keep=["embed", "lm_head"])
    with pytest.raises(BudgetError, match=r"is the original itself.*leave out --only"):
        check(job, lay_out(job, [Budget(bits=4.55)]), [Budget(bits=4.55)], tmp_path / "out")


def test_a_flag_alone_stands_in_the_command_by_itself(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    words = opened(tiny_model("llama"), tmp_path / "out", text).command({"frontier": True}, tmp_path / "out").split()
    assert words[words.index("--frontier") + 1] == "--tokens"
