"""Before any work is done: what is offered for a budget, and which refusal comes first."""

from __future__ import annotations

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
