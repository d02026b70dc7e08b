"""`supremum evaluate`: how far a model's answers are from the original's, with standard errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SupremumError
from ..plain import plain
from ..progress import note
from .common import Debug, Dtype, Json, Model, Precision, Result, Seed, page_option, refuse, text_option, verb

HARNESS = "harness:"  # before a task's name in lm-evaluation-harness
TOKENS = 16384


@verb("""
    supremum evaluate small --reference demo
    supremum evaluate smaller --reference models/llama --text held-out.txt
    supremum evaluate small/model.gguf --reference demo --tokens 16384 --json
    supremum evaluate small --reference demo --cache q8_0,q4_0 --tokens 4096
    supremum evaluate small --reference demo --details --perturb typos
    supremum evaluate small --reference demo --tasks piqa.jsonl --samples 300
    supremum evaluate small --reference demo --explain 3 --page small.html
    supremum evaluate sst2 --explain 3
    supremum evaluate small --reference sst2 --perturb typos --page small.html
""")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(
        "--reference", metavar="MODEL", help="The original; with it KL and agreement are measured.")] = None,
    text: Annotated[list[str] | None, text_option(
        "Without it a tuned model is scored by its task, and others write their own text.")] = None,
    data: Annotated[Path | None, typer.Option(
        "--data", metavar="DIR", help="Folder of a tuned model's rows, if it is not the one that it was tuned on.")] = None,
    tokens: Annotated[int | None, typer.Option(
        "--tokens", min=64, help=f"Tokens to score; {TOKENS} unless given.")] = None,
    length: Annotated[int | None, typer.Option(
        "--length", min=16, help="Tokens in a window; 1024 unless given, or what the model takes.")] = None,
    cache: Annotated[str | None, typer.Option(
        "--cache", metavar="K[,V]", help="Measure a quantised cache of keys and values instead, in llama.cpp: q8_0, q5_1, "
                                         "q5_0, q4_1, q4_0 or iq4_nl, for both or for each; or kivi8, kivi4, "
                                         "kivi2 in Transformers.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(
        "--tasks", metavar="FILE", help="Zero-shot cases (.jsonl with choices or a word to guess), or a folder of them; "
                                        "or harness:NAME, of the Language Model Evaluation Harness; repeatable. "
                                        "Without --text nothing else is measured.")] = None,
    samples: Annotated[int | None, typer.Option(
        "--samples", min=1, help="Cases of each task, or test rows of a tuned model, drawn by --seed; all unless given.")
    ] = None,
    perturb: Annotated[list[str] | None, typer.Option(
        "--perturb", metavar="KIND", help="Measure once more with typos, lower, upper or truncate; repeatable.")] = None,
    details: Annotated[bool, typer.Option(
        "--details", help="Show where the loss lies: by frequency, place and kind of token, and the tokens that changed most "
                          "(always in --json).")] = False,
    explain: Annotated[int, typer.Option(
        "--explain", metavar="N", min=0, max=20, help="Explain N answers of each text or of the task: what each token adds, "
                                                      "and where the model looks. Beside --reference those that changed "
                                                      "most, without it the worst.")] = 0,
    page: Annotated[Path | None, page_option("Write everything, charts too, as one .html file that loads nothing.")] = None,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Perplexity, KL to --reference, zero-shot tasks, or the task that a model was tuned for; all with errors.

    Against --reference: KL (mean, median, 99th percentile) and same-top-token.
    With --cache: the same of a .gguf file with that cache against its own
    float16 cache, and the bytes of both.
    With --tasks: accuracy with intervals and, against --reference, which
    answers flipped (McNemar's exact p).
    With --perturb: the same with typos, in one case, or with less context.
    Several texts are measured each by itself. Use text that the model was not
    calibrated on. Without --text the reference (or MODEL, without one) writes it.
    Where MODEL or the reference is what `supremum tune` wrote, and no --text is
    given: its task's figures on its test rows, with intervals, flips, labels and
    calibration.
    """
    _check_kinds(perturb or [])
    given = {"--tokens": tokens, "--length": length, "--details": details, "--dtype": dtype is not Precision.auto}
    if cache:
        refuse({"--page": page}, "has no form for --cache")
        refuse({"--tasks": tasks, "--samples": samples, "--perturb": perturb, "--details": details, "--explain": explain,
                "--dtype": dtype is not Precision.auto}, "has no part in --cache; evaluate twice")
    from ..train.tuned import is_language_model, is_tuned

    tuned = next((one for one in (reference, model) if is_tuned(one)), None)
    if tuned and not text and not ((tasks or cache) and is_language_model(tuned)):
        other = "; give --text, too" if is_language_model(tuned) else ""
        refuse({"--cache": cache, "--tasks": tasks, **given},
               f"has no part where a tuned model is scored by its task, as {tuned} is: leave it out{other}")
        return _by_task(model, reference, data=data, samples=samples, disturb=perturb or [], explained=explain, page=page,
                        seed=seed)
    refuse({"--data": data}, "names the test rows of a tuned model; " + (
        "they are scored without --text, --tasks and --cache" if tuned else "there is none: name one with --reference"))
    tokens = tokens or TOKENS
    if tokens < (length or 0):
        raise typer.BadParameter(f"--tokens {tokens} is less than one window (--length {length})")
    refuse({"--samples": samples and not tasks}, "says how many cases of --tasks; give both")
    if explain and tasks and not text:
        raise typer.BadParameter("--explain reads texts; name one with --text")

    from dataclasses import asdict

    from rich.console import Console

    from ..measure import (
        cache_types,
        evaluate_cache_files,
        evaluate_harness,
        evaluate_tasks,
        evaluate_texts,
        render_cache,
        render_harness,
        render_tasks,
        render_text,
        tasks_from,
    )

    if cache:
        found = evaluate_cache_files(model, reference, cache_types(cache), text=text, tokens=tokens, length=length, seed=seed)
        return {"model": model, "reference": reference, "cache": asdict(found)}, lambda: Console().print(render_cache(found))
    precision, disturb = "float32" if dtype is Precision.auto else dtype.value, tuple(perturb or ())
    document: dict[str, Any] = {"model": model, "reference": reference}
    tables: list[Any] = []
    theirs = [task.removeprefix(HARNESS) for task in tasks or [] if task.startswith(HARNESS)]
    own = [task for task in tasks or [] if not task.startswith(HARNESS)]
    cases = tasks_from(own, samples=samples, seed=seed, disturb=disturb)  # a bad file is found before the long work
    from ..train.learnt import trained_on

    if known := sorted({name for one in (model, reference) for name in trained_on(one, text or [])}):
        note(f"{', '.join(known)}: the model was trained on this text; its figures say little of other text.")
        document["trained_on"] = known
    if text or not tasks:
        texts = evaluate_texts(model, reference, texts=text, tokens=tokens, length=length, seed=seed, dtype=precision,
                               disturb=disturb, explained=explain)
        document |= {"quality": asdict(texts[0].quality)} if len(texts) == 1 else {}
        document["texts"] = [asdict(one) for one in texts]
        tables += [table for one in texts for table in render_text(one, slices=details)]
    if cases:
        report = evaluate_tasks(model, reference, cases, seed=seed, dtype=precision)
        document |= asdict(report)
        tables.append(render_tasks(report))
    if theirs:
        document["harness"] = evaluate_harness(model, reference, theirs, samples=samples, dtype=precision)
        tables.append(render_harness(document["harness"]))
    tables += _write_page(document, page)
    return document, lambda: Console().print(*tables)


def _check_kinds(kinds: list[str]) -> None:
    """An unknown --perturb is wrong usage (exit 2)."""
    if kinds:
        from ..measure.perturb import check_kinds

        try:
            check_kinds(kinds)
        except SupremumError as error:
            raise typer.BadParameter(f"--perturb: {error.cause} {error.remedy}") from error


def _write_page(document: dict[str, Any], page: Path | None) -> list[str]:
    """Write the page that was asked for, name it in the document, and give the line that says so."""
    if page is None:
        return []
    from ..report.evaluation import write_evaluation

    write_evaluation(document, page)
    document["page"] = str(page)
    return [f"Page: {page}"]


def _by_task(model: str, reference: str | None, *, page: Path | None, **options: Any) -> Result:
    """A tuned model on its task's test rows."""
    from rich.console import Console

    from ..train.evaluate import evaluate_tuned
    from ..train.show import render_evaluation

    found = evaluate_tuned(model, reference, **options)
    document: dict[str, Any] = {"model": model, "reference": reference, "task": plain(found)}
    told = _write_page(document, page)
    return document, lambda: Console().print(render_evaluation(found, reference is not None), *told)
