"""How far an encoder without a language head lies from another: its sentence vectors.

e = mean over the window's tokens of the last hidden states (what sentence encoders pool), per window:

    cosine = <e, e_ref> / (|e| |e_ref|)          relative error = |e - e_ref| / |e_ref|
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SupremumError


@dataclass(frozen=True)
class EncoderQuality:
    """Mean-pooled outputs of a headless model against its reference's; standard errors are over windows."""

    cosine_mean: float
    cosine_se: float | None
    cosine_min: float
    relative_error_mean: float
    relative_error_se: float | None
    relative_error_max: float
    tokens: int
    windows: int
    objective: str = "none"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def pooled(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean-pooled last hidden states (n, D) float32 of windows (n, T), by the base model (heads are left out)."""
    base: Any = model.base_model
    device = next(model.parameters()).device
    rows = [base(input_ids=window[None].to(device)).last_hidden_state[0].float().mean(0).cpu() for window in windows]
    return torch.stack(rows)


def compare_pooled(reference: Tensor, candidate: Tensor, *, length: int) -> EncoderQuality:
    """Summarise pooled outputs (n, D) of two models on the same n windows of `length` tokens."""
    if reference.shape != candidate.shape:
        raise SupremumError(f"The candidate's outputs have {candidate.shape[-1]} features, its reference's "
                            f"{reference.shape[-1]}.", "Compare a model with its own original.")
    reference, candidate = reference.double(), candidate.double()
    if not (torch.isfinite(reference).all() and torch.isfinite(candidate).all()):
        raise SupremumError("A model's outputs are not finite.", "Evaluate in float32, or look for broken weights.")
    cosine = torch.cosine_similarity(reference, candidate, dim=-1)
    error = (candidate - reference).norm(dim=-1) / reference.norm(dim=-1)
    root = math.sqrt(len(cosine))

    def spread(values: Tensor) -> float | None:
        return (values.std() / root).item() if len(values) > 1 else None

    return EncoderQuality(
        cosine_mean=cosine.mean().item(), cosine_se=spread(cosine), cosine_min=cosine.min().item(),
        relative_error_mean=error.mean().item(), relative_error_se=spread(error), relative_error_max=error.max().item(),
        tokens=len(cosine) * length, windows=len(cosine))
