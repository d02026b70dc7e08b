"""The statistical limit against planted laws, closed forms and brute force."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import minimize
from typer.testing import CliRunner

from supremum.cli import app
from supremum.errors import SupremumError
from supremum.limits.best import Budget, best, choices, optimum
from supremum.limits.constants import constants
from supremum.limits.forecast import check, predict, rehearse
from supremum.limits.law import Law, effective, worth_of_bits
from supremum.limits.runs import Run, read_runs
from supremum.limits.scaling import fit_runs
from supremum.limits.scaling_page import render_scaling
from supremum.limits.statistical import LAWS, TRENDS, published, published_law
from supremum.report.html import scaling_page
from supremum.report.scaling import trend

TRUE = Law(1.8, 400.0, 600.0, 0.34, 0.30, repeats=math.inf, excess=math.inf, gamma=2.6745, shift=0.3037)
SIZES, LENGTHS = np.geomspace(1e6, 1e8, 4), np.geomspace(2e7, 2e9, 4)


def ladder(noise: float = 0.0, seed: int = 0, law: Law = TRUE) -> list[Run]:
    rng = np.random.default_rng(seed)
    return [Run(n, d, float(law.loss(n, d)) * math.exp(noise * rng.standard_normal()), d, name=f"{n:.0f}-{d:.0f}")
            for n in SIZES for d in LENGTHS]


def write(runs: list[Run], path: Path) -> Path:
    rows = [{"name": run.name, "params": run.params, "tokens": run.tokens, "loss": run.loss} for run in runs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_planted_constants_come_back() -> None:
    law = fit_runs(ladder(), draws=0).law
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-4)


def test_the_fit_is_no_worse_than_a_general_minimiser() -> None:
    """The same objective by Nelder-Mead in all five unknowns, started from the truth."""
    runs = ladder(0.01, 5)
    n, d, loss = (np.array([getattr(run, name) for run in runs]) for name in ("params", "tokens", "loss"))

    def objective(e: float, a: float, b: float, alpha: float, beta: float) -> float:
        residual = np.abs(np.log((np.exp(e) + np.exp(a) / n**alpha + np.exp(b) / d**beta) / loss))
        return float(np.where(residual < 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4)).sum())

    start = [math.log(TRUE.E), math.log(TRUE.A), math.log(TRUE.B), TRUE.alpha, TRUE.beta]
    other = min(minimize(lambda x: objective(*x), at, method="Nelder-Mead", options={"maxiter": 4000}).fun
                for at in (start, np.array(start) * 1.1))
    law = fit_runs(runs, draws=0).law
    assert objective(math.log(law.E), math.log(law.A), math.log(law.B), law.alpha, law.beta) <= other * (1 + 1e-3)


def test_one_wrong_run_moves_little() -> None:
    runs = ladder()
    runs[5] = replace(runs[5], loss=1.3 * runs[5].loss)
    assert fit_runs(runs, draws=0).law.alpha == pytest.approx(TRUE.alpha, abs=0.01)


def test_intervals_cover_the_truth_and_the_runs_to_come() -> None:
    """10 ladders with 1 % noise, a larger run each: of 95 % intervals at least 7 hold (fewer: 1 in 1000 at 95 %)."""
    true, new, exponents = 6 * SIZES[-1], 2 * LENGTHS[-1], 0
    inside = 0
    for seed in range(10):
        fit = fit_runs(ladder(0.01, seed), draws=50)
        noise = math.exp(0.01 * np.random.default_rng(1000 + seed).standard_normal())
        row = check(fit, [Run(true, new, float(TRUE.loss(true, new)) * noise, new)])[0]
        inside += bool(row.inside)
        exponents += fit.intervals["alpha"][0] <= TRUE.alpha <= fit.intervals["alpha"][1]
        assert row.high - row.low < 0.2 * row.loss  # and are of use
    assert inside >= 7 and exponents >= 7


@pytest.mark.parametrize(("runs", "says"), [
    ([replace(run, loss=3 * math.exp(0.01 * math.sin(7.0 * i))) for i, run in enumerate(ladder())], "flat"),
    ([Run(n, 20 * n, float(TRUE.loss(n, 20 * n)), 20 * n) for n in np.geomspace(1e6, 1e9, 10)], "one line"),
    ([run for run in ladder() if run.tokens in LENGTHS[:2]], "Two numbers of tokens"),
])
def test_runs_that_cannot_tell_are_refused(runs: list[Run], says: str) -> None:
    fit = fit_runs(runs, draws=40)
    assert not fit.identified and any(says in line for line in fit.doubts), fit.doubts
    with pytest.raises(SupremumError, match="cannot say what is best"):
        best(fit, Budget(1e18))


def test_what_train_wrote_is_a_run(tmp_path: Path) -> None:
    for run in ladder():
        folder = tmp_path / run.name
        folder.mkdir()
        (folder / "train.json").write_text(json.dumps({
            "parameters": run.params, "tokens": run.tokens, "held_out": {"loss": run.loss}, "seconds": 3.0,
            "examples": run.tokens / 512, "inputs": {"recipe": {"length": 128}}}))
    found = read_runs(tmp_path)
    wanted = sorted(ladder(), key=lambda run: run.name)
    assert [(run.name, run.params, run.tokens, run.loss) for run in found] == [
        (run.name, run.params, run.tokens, run.loss) for run in wanted]
    assert all(run.unique_tokens == run.tokens / 4 and run.seconds == 3.0 for run in found)
    (tmp_path / found[0].name / "train.json").write_text(json.dumps({"parameters": 5, "tokens": 7, "held_out": None}))
    with pytest.raises(SupremumError, match=r"train\.json: is no train\.json with a held-out loss"):
        read_runs(tmp_path)


@pytest.mark.parametrize("runs", [ladder()[:5], [run for run in ladder() if run.params == SIZES[0]] * 2])
def test_too_few_runs_are_an_error(runs: list[Run]) -> None:
    with pytest.raises(SupremumError):
        fit_runs(runs)


def test_the_rehearsal_shows_runs_that_leave_the_law() -> None:
    assert max(abs(row.error or 0) for row in rehearse(ladder(), draws=0)) < 1e-3
    broken = [replace(run, loss=1.1 * run.loss) if run.params == SIZES[-1] else run for run in ladder()]
    rows = rehearse(broken, draws=20)
    assert len(rows) == 4 and all(row.error == pytest.approx(1 / 1.1 - 1, abs=1e-3) and not row.inside for row in rows)
    assert rehearse([run for run in ladder() if run.params in SIZES[:2]]) == []


def test_over_a_decade_only_when_told() -> None:
    fit = fit_runs(ladder(0.002), draws=20)
    assert predict(fit, 9e8, 1e9).extrapolates == ""
    with pytest.raises(SupremumError, match="over a decade"):
        predict(fit, 2e9, 1e9)
    assert "20 times" in predict(fit, 2e9, 1e9, extrapolate=True).extrapolates


@pytest.mark.parametrize("name", LAWS)
def test_the_frontier_is_the_least_on_a_fine_grid(name: str) -> None:
    law = published_law(name)
    params, tokens, loss = law.frontier(1e21)
    grid = np.geomspace(1e7, 1e12, 200_001)
    brute = law.loss(grid, 1e21 / (6 * grid))
    assert 6 * params * tokens == pytest.approx(1e21)
    assert loss == pytest.approx(brute.min(), rel=1e-9) and params == pytest.approx(grid[brute.argmin()], rel=1e-3)
    found = optimum(law, Budget(1e21))
    assert found == pytest.approx((params, tokens, loss), rel=1e-5)


def test_serving_meets_its_first_order_condition() -> None:
    """alpha A N^-alpha / (beta B D^-beta) = 1 + T/(3 D), Sardana et al."""
    law, served = published_law("besiroglu_2024"), 2e12
    params, tokens, _ = optimum(law, Budget(1e23, served=served))
    assert 6 * params * tokens + 2 * params * served == pytest.approx(1e23)
    gained = law.alpha * law.A * params**-law.alpha / (law.beta * law.B * tokens**-law.beta)
    assert gained == pytest.approx(1 + served / (3 * tokens), rel=1e-4)
    assert params < law.frontier(1e23)[0]


def test_repeated_data_is_worth_what_the_paper_says() -> None:
    """Their example: R 3, five passes are worth 3.21; up to four epochs nearly all, never more than 1 + R; and their law in
    their own numbers, 0.051 U parameters for U tokens."""
    assert effective(5.0, 1.0, 3.0) == pytest.approx(3.21, abs=0.005)
    repeats = constants()["scaling.muennighoff_2023"].values["R_D"]
    assert effective(4.0, 1.0, repeats) > 3.7 and effective(1e6, 1.0, repeats) == pytest.approx(1 + repeats)
    law = published_law("muennighoff_2023_loss")
    unique, params, tokens = 1e9, 5e8, 1e10
    base = 0.051 * unique
    theirs = (1.87 + 521 / (base * (1 + 5.31 * (1 - math.exp(-(params / base - 1) / 5.31)))) ** 0.353
              + 1488 / (unique * (1 + 15.39 * (1 - math.exp(-9 / 15.39)))) ** 0.353)
    assert float(law.constrained(params, tokens, unique)) == pytest.approx(theirs, rel=1e-3)


def test_little_data_is_repeated_and_not_beyond_use() -> None:
    law = published_law("muennighoff_2023_loss")
    free, short = optimum(law, Budget(1e20)), optimum(law, Budget(1e20, data=5e8))
    assert short[1] > 5e8 and short[2] > free[2]
    grid = np.geomspace(1e7, 1e11, 100_001)
    assert short[2] == pytest.approx(law.constrained(grid, 1e20 / (6 * grid), 5e8).min(), rel=1e-7)
    assert optimum(law, Budget(1e20, data=1e12)) == pytest.approx(free, rel=1e-4)


def test_bits_are_chosen_where_bytes_bind() -> None:
    """Brute force over parameters and bits; and in bits alone, more are better."""
    law, budget = published_law("kumar_2024_loss"), Budget(1e21, nbytes=60_000_000)
    chosen = choices(law, budget)[0]
    grid = [(law.loss(n, 1e21 / (6 * n), None, bits), bits) for bits in (2, 3, 4, 5, 6, 8, 16)
            for n in np.geomspace(1e5, 8 * 60e6 / bits, 2000)]
    assert (chosen.loss, chosen.bits) == pytest.approx(min(grid), rel=1e-6)
    assert chosen.nbytes <= 60_000_000 and "bytes" in chosen.bound_by
    assert np.all(np.diff(worth_of_bits(np.arange(1.0, 17.0), 2.6745, 0.3037)) > 0)
    assert choices(law, Budget(1e15, nbytes=10**12))[0].bits == 16.0


def test_r_and_gamma_are_fitted_where_the_runs_vary_them() -> None:
    law = replace(TRUE, repeats=6.0, gamma=2.0, shift=0.0)
    runs = [Run(n, d, float(law.loss(n, d, u, bits)), u, bits) for n in SIZES for d in LENGTHS
            for u, bits in ((d, 16.0), (d / 12, 16.0), (d, 3.0), (d, 4.0))]
    fit = fit_runs(runs, draws=0)
    assert set(fit.fitted) == {"repeats", "gamma"}
    assert fit.law.gamma == pytest.approx(2.0, rel=0.05) and fit.law.repeats == pytest.approx(6.0, rel=0.1)


def test_published_figures_carry_their_source() -> None:
    found = published(Budget(1e21, data=1e10, nbytes=10**9, served=1e12))
    assert [row["name"] for row in found["published"]] == [f"scaling.{name}" for name in LAWS]
    assert len(found["trends"]) == len(TRENDS)
    for row in [*found["published"], *found["trends"]]:
        assert row["source"] and row["date"] and row["checked"] is True
    assert found["trends"][0]["factor_a_year"] == pytest.approx(2 ** (12 / 3.5))


@pytest.mark.parametrize(("line", "says"), [
    ('{"params": 1e6, "tokens": 1e9}', "line 2: loss is missing"), ('{"params": 1e6,', "line 2: not JSON"),
    ('{"params": true, "tokens": 1e9, "loss": 2}', "params is 'True'"), ("[1]", "not a JSON object"),
    ('{"params": 1e6, "tokens": 1e9, "loss": NaN}', "loss is 'nan'"),
])
def test_a_wrong_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"params": 1e6, "tokens": 1e9, "loss": 3}\n' + line + "\n")
    with pytest.raises(SupremumError, match=says.replace("(", r"\(")):
        read_runs(path)


def test_csv_with_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbfname,params,tokens,loss,epochs\r\na,1e6,4e9,3.0,4\r\n")
    assert read_runs(path) == [Run(1e6, 4e9, 3.0, 1e9, name="a")]


def test_the_verb_answers_predicts_and_shows_the_error(tmp_path: Path) -> None:
    runs = ladder(0.002)
    larger = Run(3e8, 5e9, float(TRUE.loss(3e8, 5e9)), 5e9, name="<b>large</b>")
    path, page = write([*runs, larger], tmp_path / "runs.jsonl"), tmp_path / "page.html"
    words = ["limit", "--scaling", str(path), "--compute", "1e18", "--data", "1e9", "--bytes", "60MB",
             "--held-out", larger.name, "--predict", "2e8,1e9", "--page", str(page)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert len(document["runs"]) == 16 and abs(document["held_out"][0]["error"]) < 0.01
    assert document["best"]["choice"]["nbytes"] <= 60_000_000
    assert document["best"]["low"] < document["best"]["choice"]["loss"] < document["best"]["high"]
    text = page.read_text()
    assert "<b>large</b>" not in text and "&lt;b&gt;large&lt;/b&gt;" in text and scaling_page(document) == text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_scaling(document))
    shown = console.export_text()
    assert max(len(line) for line in shown.splitlines()) <= 80 and "Best for 1e+18 FLOP" in shown


def test_the_verb_alone_shows_other_peoples_laws() -> None:
    result = CliRunner().invoke(app, ["limit", "--scaling", "--compute", "1e21"])
    assert result.exit_code == 0 and "Besiroglu" in result.stdout and max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("words", [
    ["--compute", "1e18"], ["--scaling", "--bytes", "60MB"], ["--scaling", "--predict", "1e6,1e9"],
    ["--scaling", "runs.jsonl", "--compute", "much"], ["--scaling", "runs.jsonl", "--predict", "1e6"],
    ["demo2", "--scaling", "runs.jsonl"], ["--scaling", "runs.jsonl", "--compute", "-1"],
])
def test_wrong_usage(words: list[str]) -> None:
    assert CliRunner().invoke(app, ["limit", *words]).exit_code == 2


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    path = write(ladder(), tmp_path / "runs.jsonl")
    result = CliRunner().invoke(app, ["limit", "--scaling", str(path), "--held-out", "none"])
    assert result.exit_code == 1 and "no run named 'none'" in result.stderr


def test_a_trend_is_drawn_as_what_its_factor_leaves_with_its_interval() -> None:
    """A factor of 4 a year leaves 1/4 after a year and 1/64 after three; the interval's ends enclose it."""
    row = {"what": "price <b>", "source": "Someone, a journal", "date": "2025-11", "factor_a_year": 4.0,
           "factor_interval": [2, 8]}
    slow, fast, middle = trend(row)["data"]
    assert [middle["y"][middle["x"].index(year)] for year in (0, 1, 3)] == pytest.approx([1, 1 / 4, 1 / 64])
    assert all(f <= m <= s for f, m, s in zip(fast["y"], middle["y"], slow["y"], strict=True)) and fast["fill"] == "tonexty"
    assert "Someone" in middle["name"] and "<b>" not in json.dumps(trend(row))
    assert len(trend(row | {"factor_interval": None})["data"]) == 1
