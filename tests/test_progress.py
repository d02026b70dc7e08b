"""Progress: lines in a log, a bar on a terminal, times and peaks kept, failures passed on."""

from __future__ import annotations

import io
import resource
import time

import pytest
from rich.console import Console

from supremum import progress
from supremum.progress import note, peak_rss_mb, phase, track


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times and peaks of this test alone."""
    monkeypatch.setattr(progress, "timings", {})
    monkeypatch.setattr(progress, "peaks", {})


def test_a_log_gets_two_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("gather", 2) as advance:
        advance()
        time.sleep(0.02)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[0] == "gather ..."
    assert captured.err.splitlines()[1] == f"gather {progress.timings['gather']:.1f} s"


def test_times_of_equal_names_add_up_and_peaks_are_kept() -> None:
    for _ in range(2):
        with phase("solve"):
            time.sleep(0.02)
    with phase("write"):
        pass
    assert list(progress.timings) == ["solve", "write"] == list(progress.peaks)
    assert 0.04 <= progress.timings["solve"] < 2 and progress.timings["write"] < 0.5
    assert progress.peaks["write"] >= progress.peaks["solve"] > 50  # Python with PyTorch, MB


def test_the_peak_is_the_system_s() -> None:
    before = peak_rss_mb()
    assert before == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, rel=0.05)
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    grown = peak_rss_mb()
    del block
    assert grown >= before and peak_rss_mb() >= grown  # a peak never falls


@pytest.mark.parametrize("terminal", [False, True])
def test_everything_is_handed_on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=terminal, width=100))
    assert list(track([1, 2, 3], "count")) == [1, 2, 3]
    assert list(track(iter("ab"), "letters")) == ["a", "b"] and list(track([], "nothing")) == []
    assert list(progress.timings) == ["count", "letters", "nothing"]
    if terminal:
        assert "count" in screen.getvalue() and "3/3" in screen.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_failure_is_passed_on_and_timed(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=terminal))
    with pytest.raises(KeyError), phase("fail"):
        raise KeyError
    with pytest.raises(KeyError):
        for item in track([1, 2], "stop"):
            if item == 2:
                raise KeyError
    assert "fail" in progress.timings


def test_notes_go_to_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen))
    note("measured KL 0.0123 is above 0.01; planning again")
    assert screen.getvalue() == "measured KL 0.0123 is above 0.01; planning again\n"
