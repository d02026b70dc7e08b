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
from transformers import PreTrainedTokenizerFast

from ..errors import SupremumError
from ..text.windows import frame


def add_prompt(model: Any, tokenizer: Any, count: int, seed: int) -> tuple[Any, list[int]]:
    """(the tokenizer with `count` prompt tokens, their ids); the model has rows for them, in place.

    The tokenizer comes back as Transformers' general fast class: the class of a family may put its own frame around a text
    when it is loaded again, and what tokenizer.json says would be lost.
    """
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
    backend.post_processor = _template(tokenizer, names, ids)
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    put = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names, clean_up_tokenization_spaces=False, **special)
    if tokenizer.chat_template:
        put.chat_template = "".join(names) + tokenizer.chat_template
    return put, ids


def _template(tokenizer: Any, names: list[str], ids: list[int]) -> Any:
    """The post-processor that puts the prompt before the frame that the tokenizer has."""
    before, after = frame(tokenizer)
    old, front = tokenizer.backend_tokenizer.post_processor, " ".join(names)
    if not before and not after:  # what adds no tokens may move offsets: it stays
        put = processors.TemplateProcessing(single=f"{front} $A", pair=f"{front} $A $B:1",
                                            special_tokens=list(zip(names, ids, strict=True)))
        return processors.Sequence([old, put]) if old else put
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    found = tokenizer("a", "b")
    inner = found["input_ids"][len(before) + len(first):]
    middle = inner[: next((place for place in range(len(inner)) if inner[place:place + len(second)] == second), 0)]
    kinds = found.get("token_type_ids") or [0] * len(found["input_ids"])
    two = kinds[-1 - len(after)]  # the type that the second text has
    marks = [*names, *tokenizer.convert_ids_to_tokens([*before, *middle, *after])]
    places = [*ids, *before, *middle, *after]

    def words(part: list[int], kind: int) -> str:
        return " ".join(f"{name}:{kind}" for name in tokenizer.convert_ids_to_tokens(part))

    start = f"{front} {words(before, 0)} $A"
    return processors.TemplateProcessing(
        single=f"{start} {words(after, 0)}".split(), pair=f"{start} {words(middle, 0)} $B:{two} {words(after, two)}".split(),
        special_tokens=list(dict(zip(marks, places, strict=True)).items()))
