"""A model of a family at the sizes of the recipe: Transformers' own classes, random weights.

The table gives each family's names for six sizes; everything else is the family's default, or what `options` sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from torch import nn
from transformers import AutoConfig

from ..errors import SupremumError
from .recipe import limits

SIZES = ("layers", "width", "heads", "feed_forward", "context", "dropout")
_BERT = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings",
         "hidden_dropout_prob attention_probs_dropout_prob")
# family: (objective's auto class, its names for SIZES; "" where the family has no such size)
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("AutoModelForCausalLM", ("n_layer", "n_embd", "n_head", "n_inner", "n_positions",
                                      "resid_pdrop embd_pdrop attn_pdrop")),
    "llama": ("AutoModelForCausalLM", ("num_hidden_layers", "hidden_size", "num_attention_heads num_key_value_heads",
                                       "intermediate_size", "max_position_embeddings", "attention_dropout")),
    "bert": ("AutoModelForMaskedLM", _BERT), "roberta": ("AutoModelForMaskedLM", _BERT),
    "albert": ("AutoModelForMaskedLM", _BERT),
    "electra": ("AutoModelForPreTraining", _BERT),
    "t5": ("AutoModelForSeq2SeqLM", ("num_layers num_decoder_layers", "d_model", "num_heads", "d_ff", "", "dropout_rate")),
    "marian": ("AutoModelForSeq2SeqLM", (
        "encoder_layers decoder_layers", "d_model", "encoder_attention_heads decoder_attention_heads",
        "encoder_ffn_dim decoder_ffn_dim", "max_position_embeddings", "dropout")),
}
OBJECTIVES = {"AutoModelForCausalLM": ("causal",), "AutoModelForMaskedLM": ("masked",),
              "AutoModelForPreTraining": ("replaced",), "AutoModelForSeq2SeqLM": ("span",)}


@dataclass(frozen=True)
class Model:
    family: Literal["gpt2", "llama", "bert", "roberta", "albert", "electra", "t5", "marian"]
    layers: int = limits(4, least=1, most=1000)
    width: int = limits(256, least=1)
    heads: int = limits(4, least=1)
    feed_forward: int | None = limits(None, least=1)  # 4 x width; llama 8/3 x width
    context: int = limits(512, least=2)  # tokens that it can attend over
    dropout: float = limits(0.0, least=0, most=0.9)
    options: dict[str, Any] = field(default_factory=dict)  # of the family's configuration, by its own names


def objective_of(family: str) -> str:
    return OBJECTIVES[FAMILIES[family][0]][0]


def build(recipe: Model, tokenizer: Any, auto: str | None = None, more: Mapping[str, Any] | None = None) -> Any:
    """The model, with random weights from torch's generator; `auto`: another head than the family's own, `more`: what that
    head takes from the config."""
    own, names = FAMILIES[recipe.family]
    if recipe.width % recipe.heads:
        raise SupremumError(f"model: a width of {recipe.width} does not divide into {recipe.heads} heads.",
                            "Change model.width or model.heads.")
    forward = recipe.feed_forward or (recipe.width * 8 // 3 if recipe.family == "llama" else 4 * recipe.width)
    context = recipe.context + (2 if recipe.family == "roberta" else 0)  # its positions begin after the padding index
    values = (recipe.layers, recipe.width, recipe.heads, forward, context, recipe.dropout)
    settings: dict[str, Any] = {name: value for keys, value in zip(names, values, strict=True) for name in keys.split()}
    settings |= {"vocab_size": len(tokenizer)} | {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    if recipe.family == "albert":
        settings["embedding_size"] = min(128, recipe.width)
    if recipe.family == "roberta":
        settings["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 1
    if recipe.family == "electra":
        settings["embedding_size"] = recipe.width
    if recipe.family == "t5":
        settings |= {"d_kv": recipe.width // recipe.heads, "decoder_start_token_id": tokenizer.pad_token_id}
    if recipe.family == "marian":  # a table of 1/sqrt(width) is an input of 1 and a head whose logits begin near 1
        settings |= {"decoder_start_token_id": tokenizer.pad_token_id, "init_std": recipe.width**-0.5,
                     "scale_embedding": True, "forced_eos_token_id": None, "activation_function": "relu"}
    if recipe.family == "llama":
        settings["tie_word_embeddings"] = True
    known = AutoConfig.for_model(recipe.family).to_dict()
    for name in recipe.options:
        if name not in known:
            raise SupremumError(f"model.options.{name}: is no setting of {recipe.family}.",
                                f"They are listed under {recipe.family} in Transformers' documentation.")
    try:
        config = AutoConfig.for_model(recipe.family, **(settings | recipe.options | dict(more or {})))
        return getattr(transformers, auto or own).from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise SupremumError(f"model: {recipe.family} cannot be built of these sizes ({str(error).splitlines()[0]}).",
                            "Change the sizes or the options.") from error


def multiplied(model: nn.Module) -> int:
    """N of 6 N operations a token: parameters, without tables that are only looked up (a tied table is the head too)."""
    seen = {id(p): p.numel() for p in model.parameters()}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in heads:
            seen.pop(id(module.weight), None)
    return sum(seen.values())
