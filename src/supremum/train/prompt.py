"""Prompt tuning that ends in a plain model: the prompt's vectors are rows of the embedding, its tokens part of the tokenizer.

    h = trunk([p_1 ... p_n; embed(x)])     p (n, D) and a new head are trained; Lester et al. 2021, arXiv:2104.08691

A vector before the embedded input is what a token of its own gives, so the n vectors become n new tokens `<|prompt-i|>` that
the tokenizer puts before every text (its post-processor; its chat template, where there is one). The folder needs no adapter:
any reader of its tokenizer sees the prompt. They start as the embeddings of ordinary tokens drawn by the seed. PEFT's
TrainableTokens keeps the other rows as they are (Adam's decay would move them).
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, processors

from ..errors import SupremumError


def add_prompt(model: Any, tokenizer: Any, count: int, seed: int) -> list[int]:
    """Give both of them `count` prompt tokens, in place; returns their ids."""
    if not getattr(tokenizer, "is_fast", False):
        raise SupremumError("way: prompt needs a tokenizer with a tokenizer.json.",
                            "Use another way, or convert the tokenizer.")
    names = [f"<|prompt-{number}|>" for number in range(count)]
    known = tokenizer.get_vocab()
    if names[0] in known:
        raise SupremumError("way: prompt: the base has a tuned prompt already.", "Begin with a base without one.")
    ordinary = sorted(set(known.values()) - set(tokenizer.all_special_ids))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    drawn = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    drawn += drawn * (count // max(1, len(drawn)))
    with torch.no_grad():
        weight_VD = model.get_input_embeddings().weight
        weight_VD[ids] = weight_VD[[ordinary[place] for place in drawn[:count]]]
    backend = tokenizer.backend_tokenizer
    second = max(backend.encode("a", "b").type_ids)  # the type that the second text has
    front = " ".join(names)
    put = processors.TemplateProcessing(single=f"{front} $A", pair=f"{front} $A:0 $B:{second}",
                                        special_tokens=list(zip(names, ids, strict=True)))
    backend.post_processor = processors.Sequence([backend.post_processor, put]) if backend.post_processor else put
    if tokenizer.chat_template:
        tokenizer.chat_template = "".join(names) + tokenizer.chat_template
    return ids
