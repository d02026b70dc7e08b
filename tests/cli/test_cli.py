"""The command line's contract: exit codes, pure JSON on standard output, one-line errors, examples that parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from supremum.cli import app
from supremum.cli.common import KEPT, to_json
from supremum.errors import BudgetError

VERBS = ["limit", "optimize", "evaluate", "convert", "train", "tune", "report", "doctor"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `supremum.pipeline` with every job replaced by a recorder; `engine.behaviour` decides what jobs do."""
    seen: dict[str, Any] = {}

    def job(name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            seen[name] = (args, options)
            return module.behaviour(*args, **options)
        return run

    def no_behaviour(*args: Any, **options: Any) -> Any:
        raise BudgetError("too small.", "Use more.")

    def budget(*limits: Any) -> dict[str, Any]:
        return dict(zip(("size", "bits", "max_kl", "memory", "speed"), limits, strict=True))

    module = SimpleNamespace(Budget=budget, seen=seen, behaviour=no_behaviour,
                             optimize=job("optimize"), convert=job("convert"), measure_limits=job("limit"),
                             measure_gap=job("gap"), store_without_loss=job("lossless"))
    monkeypatch.setitem(sys.modules, "supremum.pipeline", module)
    monkeypatch.setitem(sys.modules, "supremum.frontier", SimpleNamespace(optimize_frontier=job("frontier")))
    monkeypatch.setitem(sys.modules, "supremum.floor", SimpleNamespace(
        optimize_floor=job("floor"), Floor=SimpleNamespace(parse=lambda text: f"floor {text}")))
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real program in its own process."""
    return subprocess.run([sys.executable, "-c", "from supremum.cli import main; main()", *arguments], text=True,
                          capture_output=True, env={**os.environ, "COLUMNS": "100", **environment}, timeout=120)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_and_they_parse(verb: str, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no example's model is: nothing is run
    shown = ANSI.sub("", CliRunner().invoke(app, [verb, "--help"], terminal_width=200).stdout)
    examples = re.findall(r"^ +supremum (\S+.*?) *$", shown, re.MULTILINE)
    assert examples and "Examples" in shown
    for example in examples:
        words = shlex.split(example.partition(">")[0])
        assert words[0] == verb
        assert CliRunner().invoke(app, words).exit_code != 2, f"wrong usage in the example: {example}"


def test_help_names_the_defaults_that_the_engine_has() -> None:
    from supremum.gather import TOKENS
    for verb in ("optimize", "limit"):
        shown = ANSI.sub("", CliRunner().invoke(app, [verb, "--help"]).stdout)
        shown = " ".join(word for word in shown.split() if word.isascii())  # without the box around it
        assert f"Calibration tokens; {TOKENS} unless given." in shown


def test_help_names_every_target() -> None:
    from supremum.checkpoint import targets
    shown = ANSI.sub("", CliRunner().invoke(app, ["optimize", "--help"]).stdout)
    shown = " ".join(word for word in shown.split() if word.isascii())
    assert f"reads it: {', '.join(targets.names('optimize'))}." in shown
    assert {*targets.names()} - {*targets.names("optimize")} == {"int8"}  # it holds what an archive chose
    assert {*targets.names()} - {*targets.names("convert")} == {"gptq"}  # it holds nothing but compressed layers


def test_evaluate_needs_no_text(tiny_model: Any) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tiny_model("llama")), "--tokens", "128", "--length", "64", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["quality"]["tokens"] == 126


def test_help_is_fast_and_does_not_import_torch() -> None:
    code = "import sys; from supremum.cli import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    run("--help")  # the first one may have to write byte code
    started = time.perf_counter()
    assert run("--help").returncode == 0
    assert time.perf_counter() - started < 2  # 0.3 s alone on one core; tests share the machine


@pytest.mark.parametrize("words", [
    ["optimise", "demo"], ["optimize", "demo", "--size", "60 elephants"], ["optimize", "demo", "--bits", "40"],
    ["optimize", "demo", "--bits", "nan"], ["optimize", "demo", "--max-kl", "-1"], ["optimize", "demo"],
    ["optimize", "demo", "--size", "60MB", "--target", "tape"],
    ["optimize", "demo", "--lossless", "--bits", "3"], ["evaluate"], ["convert", "demo"],
    ["optimize", "demo", "--bits", "3", "--target", "int8"], ["convert", "demo", "--target", "gptq", "--out", "x"],
    ["optimize", "demo", "--frontier", "--floor-data", "texts"],
    *(["optimize", "demo", "--lossless", *more] for more in (
        ["--target", "gptq"], ["--target", "gguf"], ["--text", "a.txt"], ["--tokens", "4096"], ["--keep", "head"],
        ["--only", "Q4_0"], ["--seed", "1"], ["--dtype", "float32"])),
    *(["evaluate", "demo", "--cache", "q8_0", *more] for more in (
        ["--tasks", "a.jsonl"], ["--samples", "3"], ["--perturb", "typos"], ["--details"], ["--explain", "1"],
        ["--dtype", "float32"])),
    ["evaluate", "demo", "--samples", "3"], ["evaluate", "demo", "--perturb", "noise"],
    ["optimize", "demo", "--frontier", "--bits", "3"], ["optimize", "demo", "--frontier", "--lossless"],
    ["optimize", "demo", "--frontier", "--speed", "2x"], ["optimize", "demo", "--speed", "fast"],
    ["optimize", "demo", "--speed", "0x"], ["optimize", "demo", "--memory", "much"],
    ["optimize", "demo", "--floor", "accuracy=1.2x"], ["optimize", "demo", "--floor", "accuracy"],
    ["optimize", "demo", "--floor", "accuracy=0.0"], ["optimize", "demo", "--floor", "accuracy=0.9x", "--frontier"],
    ["optimize", "demo", "--size", "60MB", "--floor-data", "texts"],
    ["optimize", "demo", "--frontier", "3,,4"], ["optimize", "demo", "--frontier", "3,40"],
    ["evaluate", "demo", "--tokens", "100", "--length", "512"], ["limit", "demo", "--no-such-flag"],
])
def test_wrong_usage_exits_with_2_and_says_why(words: list[str], engine: Any) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stdout == "" and len(result.stderr) > 40
    assert engine.seen == {}


def test_an_unknown_perturbation_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "gone"), "--perturb", "typos", "--perturb", "noise"])
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2 and "gone" not in said
    assert "'noise' is no way to disturb a text. Choose of typos, lower, upper, truncate." in said


def test_help_fits_80_columns() -> None:
    """What comes between the first line and the options, which Rich breaks itself: no line is broken again."""
    import supremum.cli as cli
    commands = [one.callback for app in (cli.app, cli.text) for one in app.registered_commands]
    assert len(commands) >= 12
    for command in commands:
        for line in command.__doc__.split("\n\n", 1)[1].splitlines():
            assert len(line) <= 78, (command.__name__, line)


def test_train_and_tune_say_their_options_alike() -> None:
    def options(verb: str) -> list[tuple[object, ...]]:
        parameters = get_command(app).commands[verb].params  # type: ignore[attr-defined]
        return [(one.name, one.opts, one.metavar, one.default, one.required, one.help) for one in parameters]

    assert options("train") == options("tune")


@pytest.mark.parametrize("words, budget", [([], None), (["--size", "60MB"], 60_000_000)])
def test_the_floor_reaches_the_engine(words: list[str], budget: int | None, engine: Any) -> None:
    CliRunner().invoke(app, ["optimize", "sst2", "--floor", "accuracy=0.99x", "--floor-data", "texts", *words])
    (model, floor, given), options = engine.seen["floor"]
    assert (model, floor, options["data"]) == ("sst2", "floor accuracy=0.99x", Path("texts"))
    assert (given and given["size"]) == budget and "optimize" not in engine.seen


def test_the_budget_reaches_the_engine_in_bytes(engine: Any) -> None:
    CliRunner().invoke(app, ["optimize", "models/llama", "--size", "60MB", "--max-kl", "0.05", "--keep", "head",
                             "--keep", "embed", "--only", "Q4_0", "--fresh", "--seed", "7", "--text", "a.txt",
                             "--dtype", "float32", "--memory", "200MB", "--speed", "2x", "--quick"])
    (model, budget), options = engine.seen["optimize"]
    assert model == "models/llama" and budget == {"size": 60_000_000, "bits": None, "max_kl": 0.05, "memory": 200_000_000,
                                                  "speed": "2x"}
    assert options == {"target": "gguf", "text": ["a.txt"], "tokens": None, "out": Path("llama-supremum"),
                       "keep": ["head", "embed"], "only": ["Q4_0"], "quick": True, "fresh": True, "seed": 7,
                       "dtype": "float32"}


def test_the_output_is_named_after_the_model_however_it_is_written(engine: Any, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "llama")
    for model, name in ((".", "llama"), ("sub/..", "llama"), ("sub", "sub"), ("org/name", "name"), ("a/b.gguf", "b")):
        CliRunner().invoke(app, ["optimize", model, "--bits", "4"])
        assert engine.seen["optimize"][1]["out"] == Path(f"{name}-supremum")


def test_a_conversion_shows_its_proof(engine: Any, tmp_path: Path) -> None:
    proof = {"runtime": "llama_cpp", "version": "xllamacpp 1", "positions": 12, "passed": True, "kl_mean": 1e-6}
    (tmp_path / "converted.json").write_text(json.dumps({"proof": proof}))
    engine.behaviour = lambda *_, **__: tmp_path / "model.gguf"
    words = ["convert", "demo", "--target", "gguf", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, words).stdout.splitlines()[1] == "Proved in llama.cpp (xllamacpp 1)."
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["proof"] == proof


@pytest.mark.parametrize(("words", "bits"), [
    (["demo", "--frontier"], None), (["--frontier", "demo"], None), (["demo", "--frontier", "--seed", "0"], None),
    (["demo", "--frontier", "2.5,3,4"], [2.5, 3, 4]), (["--frontier=3", "demo"], [3]), (["--frontier", "3.5", "demo"], [3.5]),
])
def test_a_frontier_has_its_own_points_or_the_usual_ones(words: list[str], bits: list[float] | None, engine: Any) -> None:
    CliRunner().invoke(app, ["optimize", *words, "--target", "archive"])
    (model, found), options = engine.seen["frontier"]
    assert (model, found, options["target"]) == ("demo", bits, "archive") and "optimize" not in engine.seen


def test_help_names_the_points_of_a_frontier() -> None:
    from supremum.frontier import BITS
    shown = ANSI.sub("", CliRunner().invoke(app, ["optimize", "--help"]).stdout)
    shown = " ".join(word for word in shown.split() if word.isascii())
    assert ",".join(f"{bits:g}" for bits in BITS) in shown.replace(", ", ",")


def test_a_failure_is_one_line_with_its_remedy_and_exit_1(engine: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BudgetError("10 MB cannot\nhold \x1b[31mthis.", "The smallest feasible size is 43 MB.")

    engine.behaviour = fail
    result = CliRunner().invoke(app, ["optimize", "demo", "--size", "10MB"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "supremum: error: 10 MB cannot hold ?[31mthis. The smallest feasible size is 43 MB.\n"
    result = CliRunner().invoke(app, ["optimize", "demo", "--size", "10MB", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["remedy"] == "The smallest feasible size is 43 MB."


def test_a_bug_is_one_line_and_the_traceback_comes_with_debug(engine: Any) -> None:
    engine.behaviour = lambda *_, **__: {}["missing"]
    result = CliRunner().invoke(app, ["limit", "demo"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "internal error: KeyError: 'missing'" in result.stderr and "--debug" in result.stderr
    for words, environment in ((["limit", "demo", "--debug"], {}), (["limit", "demo"], {"SUPREMUM_DEBUG": "1"})):
        result = CliRunner().invoke(app, words, env=environment)
        assert result.exit_code == 1 and "Traceback" in result.stderr


def test_an_interrupt_exits_with_130_and_says_how_to_resume(engine: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    engine.behaviour = interrupt
    result = CliRunner().invoke(app, ["optimize", "demo", "--size", "60MB"])
    assert result.exit_code == 130 and KEPT in result.stderr and result.stdout == ""


def test_json_stays_pure_when_libraries_print_even_from_c() -> None:
    code = """if True:
        import os, sys, types
        def noisy(*args, **options):
            print("a library's banner")
            os.write(1, b"a banner from C\\n")
            return types.SimpleNamespace(to_dict=lambda: {"kl": float("nan"), "bits": 3.5})
        sys.modules["supremum.pipeline"] = types.SimpleNamespace(measure_limits=noisy)
        sys.argv = ["supremum", "limit", "demo", "--json"]
        from supremum.cli import main
        main()"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"kl": None, "bits": 3.5}
    assert "a library's banner" in result.stderr and "a banner from C" in result.stderr


def test_doctor_reports_versions_and_what_is_missing() -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["libraries"]["torch"] and document["machine"]["ram_bytes"] > 0
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = dict(re.findall(r"^([a-z-]+) = (\[.*\])", project, re.MULTILINE))
    assert all(f'"{entry["package"]}>' in extras[found[1]] for entry in document["runtimes"]
               if (found := re.search(r"supremum\[(.*)\]", entry["install"])))
    assert {"peft", "scikit-learn", "sacrebleu", "rouge-score", "captum", "lm-eval"} < {
        entry["package"] for entry in document["runtimes"]}
    assert all(entry["installed"] or entry["install"].startswith("pip install") for entry in document["runtimes"])
    shown = run("doctor").stdout
    assert document["machine"]["cpu"] in shown and max(map(len, shown.splitlines()[3:])) <= 80


def test_version() -> None:
    from supremum import __version__
    assert CliRunner().invoke(app, ["--version"]).stdout == f"supremum {__version__}\n"


def test_json_is_strict() -> None:
    assert json.loads(to_json({"a": [float("inf"), 1.5], "p": Path("x"), 3: None})) == {
        "a": [None, 1.5], "p": "x", "3": None}


def test_the_readmes_commands_are_right_usage(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    commands = re.findall(r"^supremum (\S.*?) *(?:#.*)?$", readme.read_text(), re.MULTILINE)
    assert {shlex.split(command)[0] for command in commands} == {*VERBS, "text"}
    monkeypatch.chdir(tmp_path)
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code in (0, 1), f"supremum {command}: {result.stderr}"


def test_a_finished_run_can_be_reported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "report"))
    from report_sample import build

    from supremum.report import encode
    (tmp_path / "supremum.json").write_bytes(encode(build()))
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0 and "0.0654" in result.stdout
    assert {"report.html", "README.md", "supremum.json"} == {path.name for path in tmp_path.iterdir()}
    assert json.loads(CliRunner().invoke(app, ["report", str(tmp_path), "--json"]).stdout) == build()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "supremum.json")])
    assert result.exit_code == 0 and str(tmp_path / "report.html") in result.stdout
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "nothing: does not exist" in result.stderr
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "empty")])
    assert result.exit_code == 1 and "empty: holds no supremum.json" in result.stderr


def test_a_wrong_path_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("text " * 2000)
    result = run("evaluate", str(tmp_path / "missing"), "--text", str(tmp_path / "held.txt"))
    assert result.returncode == 1 and result.stdout == ""
    assert "missing: does not exist. Give a model folder" in result.stderr.strip().splitlines()[-1]


def test_evaluate_writes_a_page_and_refuses_what_it_cannot_explain(tiny_model: Any, tmp_path: Path) -> None:
    model, page = str(tiny_model("llama")), tmp_path / "a.html"
    short = ["--tokens", "128", "--length", "64"]
    for beside in ([], ["--reference", model]):
        result = CliRunner().invoke(app, ["evaluate", model, *beside, *short, "--explain", "2", "--page", str(page)])
        assert result.exit_code == 0 and result.output.count("weighed most:") == 2, result.output
        assert max(map(len, result.output.replace(str(page), "").splitlines())) <= 80
        assert ("original" in result.output) == bool(beside) == ("Why an answer changed" in page.read_text())
        assert "attention0-1" in page.read_text()
    result = CliRunner().invoke(app, ["evaluate", model, *short, "--page", str(page)])
    assert result.exit_code == 0 and str(page) in result.output.replace("\n", "") and "Perplexity" in page.read_text()
    for more, said in ((["--page", str(tmp_path / "a.txt")], "ends in .html"),
                       (["--page", str(tmp_path / "no" / "a.html")], "exists"),
                       (["--explain", "1", "--tasks", "x.jsonl"], "--explain")):
        refused = CliRunner().invoke(app, ["evaluate", model, *short, *more])
        assert refused.exit_code in (1, 2) and said in refused.output + str(refused.exception), refused.output
