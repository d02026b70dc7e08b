"""Prices against the whole model: K-FAC's in float64 by autograd, a table's by plain Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.gather import Gathered, gather, gather_fisher, solve_candidates
from supremum.prices import MEASURED_TOKENS, prices
from supremum.solve.candidates import Candidates
from supremum.stats.fisher import score
from supremum.text.windows import spread
from supremum.workspace import Workspace

from .test_pipeline import text  # noqa: F401  (a fixture)


def priced(folder: Path, source: str, tmp_path: Path, layer: str,
           ) -> tuple[Gathered, Candidates, dict[tuple[str, str], float]]:
    """A model's statistics, with two formats of one layer and of the embedding solved and priced."""
    gathered = gather(open_checkpoint(folder), Workspace(tmp_path / "work", {}), text=[source], tokens=2048, seed=3,
                      dtype="float32")
    gather_fisher(gathered, 3)
    menu = {name: ["MXFP4", "Q8_0"] if name in (layer, *gathered.stream.tables()) else [] for name in gathered.shapes}
    candidates = solve_candidates(gathered, menu)
    return gathered, candidates, prices(gathered, candidates)


@pytest.mark.parametrize(("family", "layer"), [("llama", "model.layers.1.self_attn.o_proj.weight"),
                                               ("gpt2", "transformer.h.1.mlp.c_proj.weight")])
def test_a_layers_price_is_its_change_under_independent_inputs_and_scores(
        tiny_model: Any, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layer: str,  # noqa: F811
) -> None:
    """c/2 E[(g_t . dW x_s)^2] over all pairs of positions, in float64 by autograd of the whole model."""
    monkeypatch.setattr("supremum.gather.shrunk", lambda fisher, share: fisher)
    monkeypatch.setattr(Gathered, "coupling", lambda self, block, layer: 0.5)
    gathered, candidates, nats = priced(tiny_model(family, "float32"), text, tmp_path, layer)
    model, inputs, scores = gathered.checkpoint.model(torch.float64), [], []
    module, seen = model.get_submodule(layer.removesuffix(".weight")), []
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for n, window_T in enumerate(gathered.windows):
        logits_1TV = model(input_ids=window_T[None]).logits
        x_1TI, y_1TO = seen.pop()
        upper = score(logits_1TV.float(), torch.Generator().manual_seed(3 * 1_000_003 + n)).double()
        inputs.append(x_1TI[0].detach())
        scores.append(torch.autograd.grad(logits_1TV, y_1TO, upper)[0][0])
    for codec in ("MXFP4", "Q8_0"):
        change_OI = (candidates.get(layer, codec).decode() - gathered.weight(layer)).double()
        exact = 0.5 * 0.5 * float((torch.cat(scores) @ change_OI @ torch.cat(inputs).T).square().mean())
        assert nats[layer, codec] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tables_price_is_the_kl_of_the_model_with_it(tiny_model: Any, text: Any, tmp_path: Path, tied: bool) -> None:  # noqa: F811
    """Of the embedding and the head, apart or one table, against plain Transformers on the same windows."""
    gathered, candidates, nats = priced(tiny_model("llama", "float32", tie_word_embeddings=tied), text, tmp_path, "")
    every = len(gathered.held_out)
    windows_NT = gathered.held_out[spread(every, min(every, -(-MEASURED_TOKENS // gathered.held_out.shape[1])))]
    original = gathered.checkpoint.model(torch.float32)
    assert len(gathered.stream.tables()) == (1 if tied else 2)
    for name in gathered.stream.tables():
        for codec in ("MXFP4", "Q8_0"):
            model = gathered.checkpoint.model(torch.float32)
            with torch.no_grad():
                model.get_parameter(name).copy_(candidates.get(name, codec).decode())
                p_NTV, q_NTV = (m(input_ids=windows_NT).logits[:, :-1].log_softmax(-1) for m in (original, model))
            kl = float((p_NTV.exp() * (p_NTV - q_NTV)).sum(-1).mean())
            assert nats[name, codec] == pytest.approx(kl, rel=0.01, abs=1e-6)
        assert nats[name, "Q8_0"] < 0.1 * nats[name, "MXFP4"]
