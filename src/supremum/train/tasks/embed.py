"""Sentence embeddings: the mean of the last hidden states, length 1; texts of one label are drawn together.

    L = - mean over i, and over p of the same label as i, of log exp(e_i e_p / tau) / sum_{j != i} exp(e_i e_j / tau)

Supervised contrastive loss, Khosla et al. 2020 (arXiv:2004.11362), eq. 2. The score is the mean silhouette of the labels
(cosine). Zero epochs score the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rows import Row
from .base import Figures, Task, batches, means
from .classify import Classify


def pool(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Unit mean of the hidden states that are no padding (B, D)."""
    weight_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    mean_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=-1)


def contrastive(unit_BD: Tensor, label_B: Tensor, tau: float) -> Tensor:
    """The loss above; zero where no two of the batch share a label."""
    itself_BB = torch.eye(len(unit_BD), dtype=torch.bool, device=unit_BD.device)
    like_BB = (unit_BD @ unit_BD.T / tau).masked_fill(itself_BB, float("-inf")).log_softmax(-1)
    same_BB = (label_B[:, None] == label_B[None]) & ~itself_BB
    count_B = same_BB.sum(-1)
    mean_B = like_BB.masked_fill(~same_BB, 0).sum(-1) / count_B.clamp(min=1)
    return -mean_B[count_B > 0].mean() if bool((count_B > 0).any()) else unit_BD.sum() * 0


class Embed(Classify):
    name = "embed"
    auto = "AutoModel"
    metric = "silhouette"
    new_head = False

    def __init__(self) -> None:
        super().__init__()
        self.settings["temperature"] = 0.1

    question = Task.question  # a vector is no answer whose probability could be explained

    def config(self) -> dict[str, Any]:
        return {}

    def loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        label_B = inputs.pop("labels")
        hidden_BTD = model(**inputs).last_hidden_state
        return contrastive(pool(hidden_BTD, inputs["attention_mask"]), label_B, self.settings["temperature"])

    def logits(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> Tensor | None:
        return None

    @torch.inference_mode()
    def predict(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[Any]:
        said: list[Any] = [None] * len(rows)
        for places, inputs in batches(self._tokens(rows, tokenizer), self.collate(tokenizer), batch, model.device):
            unit_BD = pool(model(**inputs).last_hidden_state.float(), inputs["attention_mask"])
            for place, unit_D in zip(places, unit_BD.cpu().numpy(), strict=True):
                said[place] = unit_D
        return said

    def each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[float] | None:
        from ...measure.metrics import library

        rows_ND = np.stack(list(predictions)).astype(np.float64)
        found: list[float] = library("sklearn.metrics").silhouette_samples(rows_ND, list(truth), metric="cosine").tolist()
        return found

    def figures(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures]:
        """The silhouette alone: the clusters of every draw would have to be found anew."""
        return means({"silhouette": self.each(truth, predictions) or []})

    def by_label(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures] | None:
        return None

    def right(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[bool] | None:
        return None

    def score(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        from ...measure.metrics import clustering

        return clustering(np.stack(list(predictions)), truth)
