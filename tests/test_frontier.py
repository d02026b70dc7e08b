"""The frontier in one run: each point is what its own budget gives, work is not done twice, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from supremum import Budget, optimize
from supremum import frontier as module
from supremum.errors import BudgetError, StateError, SupremumError
from supremum.frontier import optimize_frontier
from supremum.report import read_document
from supremum.report.frontier import read_frontier
from tests.test_pipeline import TOKENS, files, text  # noqa: F401  (the fixture)

CHILD = """
import sys
from supremum import optimize_frontier
optimize_frontier(sys.argv[1], [5, 7], text=[sys.argv[2]], tokens=1024, out=sys.argv[3], dtype="float32")
"""


def draw(model, text, out, bits, **options):  # noqa: F811
    return optimize_frontier(model, bits, text=[text], tokens=TOKENS, out=out, dtype="float32", **options)


def test_a_frontier_with_a_damaged_point_is_not_finished(drawn, tiny_model, text, tmp_path):  # noqa: F811
    copied = tmp_path / "out"
    shutil.copytree(drawn.folder, copied)
    (copied / "5" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(StateError, match=r"5/model.gguf: holds 4 bytes .*--fresh"):
        draw(tiny_model("llama"), text, copied, [5, 7])
    shutil.rmtree(copied / "5")
    with pytest.raises(StateError, match=r"out/5: is no longer .*--fresh"):
        draw(tiny_model("llama"), text, copied, [5, 7])


@pytest.fixture(scope="module")
def drawn(tiny_model, text, tmp_path_factory):  # noqa: F811
    return draw(tiny_model("llama"), text, tmp_path_factory.mktemp("frontier") / "out", [7, 5])


def test_each_point_is_what_its_budget_alone_gives(drawn, tiny_model, text, tmp_path):  # noqa: F811
    alone = optimize(tiny_model("llama"), Budget(bits=5), text=[text], tokens=TOKENS, out=tmp_path / "alone", dtype="float32")
    assert files(alone.folder) == files(drawn.folder / "5") != files(drawn.folder / "7")
    for bits in (5, 7):
        document = read_document(drawn.folder / f"{bits}")
        assert document["budget"]["bits"] == bits and document["proof"]["passed"]
        assert f"--bits {bits}" in document["command"] and document["command"].endswith(f"--out {drawn.folder}/{bits}")
        assert (drawn.folder / f"{bits}" / "report.html").exists()
        names = [phase["name"] for phase in document["phases"]]
        assert names.count("solve the layers") == 1 and "gather moments" in names
    assert not drawn.folder.with_name("out.work").exists()


def test_its_document_holds_what_the_points_say(drawn):
    frontier = read_frontier(drawn.folder)
    assert frontier == json.loads(json.dumps(drawn.frontier)) and frontier["asked"] == [5, 7]
    assert [row["folder"] for row in frontier["points"]] == ["5", "7"]
    for row in frontier["points"]:
        result = read_document(drawn.folder / row["folder"])["result"]
        assert (row["bytes"], row["kl"]) == (result["bytes"], result["measured"]["kl_mean"])
        assert (drawn.folder / row["folder"] / row["file"]).stat().st_size == row["bytes"]
        assert row["bits_per_weight"] <= row["asked"]
    assert frontier["points"][0]["kl"] > frontier["points"][1]["kl"]
    kinds = [point["kind"] for point in frontier["frontier"]]
    assert kinds.count("measured") == kinds.count("predicted") == 2 and kinds.count("limit") > 10
    page = (drawn.folder / "frontier.html").read_text()
    assert 'href="./5/report.html"' in page and "var(--predicted)" in page


def test_it_is_not_done_twice_nor_replaced_unasked(drawn, tiny_model, text, monkeypatch):  # noqa: F811
    model = tiny_model("llama")
    monkeypatch.setattr(module, "statistics", lambda *_: pytest.fail("nothing is left to do"))
    assert draw(model, text, drawn.folder, [5, 7]).frontier == read_frontier(drawn.folder)
    with pytest.raises(SupremumError, match=r"another result, made by `supremum optimize .*--frontier 5,7 .*--fresh"):
        draw(model, text, drawn.folder, [5, 6])
    with pytest.raises(SupremumError, match="another result"):
        optimize(model, Budget(bits=5), text=[text], tokens=TOKENS, out=drawn.folder, dtype="float32")


def test_what_cannot_be_had_is_left_out_or_refused_when_named(tiny_model, text, tmp_path, capsys, monkeypatch):  # noqa: F811
    model = tiny_model("qwen2", "bfloat16")
    with pytest.raises(BudgetError, match=r"least to be had as gguf is 2\.\d+ bits"):
        draw(model, text, tmp_path / "out", [1.5, 5])
    with pytest.raises(BudgetError, match=r"the original, or all .*, has 16\.000 bits"):
        draw(model, text, tmp_path / "out", [5, 16])
    assert not list(tmp_path.iterdir())
    with pytest.raises(BudgetError, match=r"has 6\.000 bits"):  # fill.MOST_BITS
        draw(model, text, tmp_path / "out", [6, 8], target="archive")
    with pytest.raises(BudgetError, match=r"least to be had as gguf is 8\.5.*Choose another --target. Or leave out --only"):
        draw(model, text, tmp_path / "out", None, only=["Q8_0"])
    monkeypatch.setattr(module, "check", lambda job, layout, budgets, folder: left.extend(budgets) or sys.exit())
    left = []
    with pytest.raises(SystemExit):
        draw(model, text, tmp_path / "out", None, only=["Q5_0"])
    assert left == [Budget(bits=6), Budget(bits=8)] and "\n5 bits is left out: the least" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_run_goes_on_with_the_next_point(drawn, tiny_model, text, tmp_path):  # noqa: F811
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    command = [sys.executable, "-c", CHILD, str(tiny_model("llama")), text, str(tmp_path / "out")]
    first = tmp_path / "out.work" / "frontier" / "5"
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while child.poll() is None and not first.exists():
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    made = (first / "supremum.json").stat().st_mtime_ns
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert (tmp_path / "out" / "5" / "supremum.json").stat().st_mtime_ns == made
    for name in ("5", "7"):
        assert files(tmp_path / "out" / name) == files(drawn.folder / name)
