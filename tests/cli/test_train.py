"""`supremum train` on the command line: examples, one-line errors, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supremum.cli import app


def test_an_unknown_key_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("optimizer: adamw\n")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["remedy"] == "Did you mean optimiser?"


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_same_command_resumes(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the river carries the stone to the garden. " * 300)
    (tmp_path / "r.yaml").write_text(
        "text: [t.txt]\ntokenizer: characters\nmodel: {family: gpt2, layers: 1, width: 32, heads: 2, context: 32}\n"
        "length: 32\nsteps: 400\ncheckpoint_every: 20\n")
    command = [sys.executable, "-m", "supremum", "train", str(tmp_path / "r.yaml"), "--data", str(tmp_path),
               "--out", str(tmp_path / "m"), "--json"]
    started = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list((tmp_path / "m.work").glob("checkpoint-*")):
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=120)
    assert started.returncode == 130 and not out and "resumes" in err
    again = subprocess.run(command, text=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert again.returncode == 0 and "goes on from" in again.stderr
    assert json.loads(again.stdout)["steps"] == 400
