"""Tasks of the Language Model Evaluation Harness (lm_eval, extra `harness`) on any model that Supremum opens.

The harness makes the prompts, the filters and the metrics; here are only a model's answers: log-likelihoods by the trees of
trees.py, and greedy continuations. With a reference the flips of every metric that is 0 or 1 on each document.

    evaluate_harness("small", "demo", ["arc_easy", "lambada_openai"], samples=300)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.architecture import objective
from ..errors import SupremumError
from ..progress import phase
from ..text.windows import context_length
from .intervals import mcnemar
from .metrics import library
from .trees import Text, TreeScorer, shorten


def evaluate_harness(model: str | Path, reference: str | Path | None, tasks: Sequence[str | dict[str, Any]], *,
                     samples: int | None = None, dtype: torch.dtype | str = torch.float32) -> list[dict[str, Any]]:
    """One row a task and metric: task, metric, value, stderr, and beside a reference its value, gained, lost and p.

    tasks: the harness's names, or task configurations; `samples` takes the first documents of each.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    found, beside = [_results(one, tasks, samples, kind) if one is not None else None for one in (model, reference)]
    assert found is not None
    rows = []
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, rest = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{rest}")
            row = {"task": task, "metric": metric, "value": value, "stderr": error if isinstance(error, float) else None}
            if beside is not None:
                row["reference"] = beside["results"][task][key]
                before, after = [_each(results, task, metric) for results in (beside, found)]
                if before and before.keys() == after.keys():
                    row |= mcnemar([before[i] for i in sorted(before)], [after[i] for i in sorted(before)])
            rows.append(row)
    return rows


def _each(results: Any, task: str, metric: str) -> dict[int, bool]:
    """Whether each document was right, where `metric` says so."""
    found = {one["doc_id"]: one.get(metric) for one in results.get("samples", {}).get(task, [])}
    return {index: bool(value) for index, value in found.items()} if set(found.values()) <= {0, 1} else {}


def _results(source: str | Path, tasks: Sequence[Any], samples: int | None, dtype: torch.dtype) -> Any:
    from ..checkpoint import open_checkpoint

    lm_eval = library("lm_eval", "harness")
    answers = language_model(open_checkpoint(source), dtype)
    try:
        return lm_eval.simple_evaluate(model=answers, tasks=list(tasks), limit=samples, bootstrap_iters=0, log_samples=True)
    except (KeyError, ValueError, FileNotFoundError, ConnectionError) as error:
        raise SupremumError(f"The harness cannot run {', '.join(map(str, tasks))} ({error}).",
                            "See `lm_eval ls tasks`; its data sets come from the hub.") from error


def language_model(checkpoint: Any, dtype: torch.dtype = torch.float32) -> Any:
    """An lm_eval model of a checkpoint."""
    model, tokenizer = checkpoint.model(dtype), checkpoint.tokenizer()
    if objective(type(model).__name__) != "next":
        raise SupremumError(f"{checkpoint.source}: a {type(model).__name__} predicts no next tokens.",
                            "The harness needs a causal language model.")
    limit = context_length(checkpoint) or 2048
    scorer = TreeScorer(model, limit)
    utils = library("lm_eval.utils", "harness")

    def likelihoods(cases: list[list[Text]]) -> list[tuple[float, bool]]:
        with phase(f"harness: {checkpoint.source}", len(cases)) as advance:
            found = {}
            for index, scores in scorer.score([[shorten(text, limit) for text in case] for case in cases]):
                found[index] = scores
                advance()
        return [score for index in range(len(cases)) for score in found[index]]

    class Answers(library("lm_eval.api.model", "harness").TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return next(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if t is not None)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer(string, add_special_tokens=add_special_tokens is not False, verbose=False).input_ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            texts = [(context, Text([*context, *rest], len(context))) for _, context, rest in requests]
            return likelihoods([[text for _, text in group] for _, group in groupby(texts, lambda pair: pair[0])])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            cases = []
            for (string,) in [request.args for request in requests]:
                ids = tokenizer(string, add_special_tokens=False, verbose=False).input_ids
                rolled = map(utils.make_disjoint_window,
                             utils.get_rolling_token_windows(ids, self.eot_token_id, limit - 1, 1))
                cases.append([Text([*before, *after], len(before)) for before, after in rolled])
            found = iter(likelihoods([[text] for case in cases for text in case]))
            return [sum(next(found)[0] for _ in case) for case in cases]

        @torch.inference_mode()
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            written = []
            with phase(f"harness: {checkpoint.source}", len(requests)) as advance:
                for prompt, settings in [request.args for request in requests]:
                    most = int(settings.get("max_gen_toks", 256))
                    ids = torch.tensor([tokenizer(prompt, verbose=False).input_ids[-(limit - most):]], device=scorer.device)
                    stops = [settings["until"]] if isinstance(settings.get("until"), str) else settings.get("until") or []
                    out = model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False,
                        stop_strings=stops or None, tokenizer=tokenizer, pad_token_id=self.eot_token_id)
                    text = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
                    written.append(min((text.split(stop)[0] for stop in stops), key=len, default=text))
                    advance()
            return written

    return Answers()
