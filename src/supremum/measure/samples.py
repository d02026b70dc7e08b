"""Greedy continuations of the original and the compressed model, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue to a ten-year-old.",
    "Write a Python function that returns the n-th Fibonacci number.",
)


@dataclass(frozen=True)
class Sample:
    """`same_tokens` of `tokens` (the original's length) came before the first different token."""

    prompt: str
    original: str
    compressed: str
    same_tokens: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def samples(original: nn.Module, compressed: nn.Module, tokenizer: Any, prompts: Sequence[str] = PROMPTS, *,
            tokens: int = 64) -> list[Sample]:
    """Continue each prompt greedily by at most `tokens` tokens; through the chat template where there is one."""
    result = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt)
        one, other = (_continue(model, tokenizer, ids, tokens) for model in (original, compressed))
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in (one, other)]
        result.append(Sample(prompt, texts[0], texts[1], same, len(one)))
    return result


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """The prompt's tokens (1, T): a user's turn of the chat template (Transformers renders it sandboxed), or bare."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                             return_tensors="pt", return_dict=True)["input_ids"]
    return tokenizer(prompt, return_tensors="pt").input_ids


@torch.inference_mode()
def _continue(model: Any, tokenizer: Any, ids: Tensor, tokens: int) -> list[int]:
    ids = ids.to(next(model.parameters()).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                         temperature=None, top_p=None, top_k=None, pad_token_id=pad)
    return out[0, ids.shape[1]:].tolist()
