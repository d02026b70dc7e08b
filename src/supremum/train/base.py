"""The model that a task starts from: any checkpoint's trunk under the task's head.

Every format that opens is a base, quantised ones too: their weights are decoded to float32, or stay in their file while an
adapter is trained (way: qlora). A head that the checkpoint does not have is drawn from the seed.

`scratch` starts from nothing: a family at the recipe's sizes, its tokenizer made of the training rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import SupremumError
from .corpus import MADE, TokenizerRecipe, loaded, trained
from .models import FAMILIES, Model, build, objective_of
from .quantised import draw_missing, keep_quantised
from .rows import Row
from .tasks import Task
from .ways import blocks


def load(source: str, task: Task, seed: int, *, quantised: bool = False) -> tuple[Any, Any, str]:
    """(model for the task, tokenizer, fingerprint of the checkpoint). quantised: layers stay as their file has them
    (quantised.py)."""
    checkpoint = open_checkpoint(source)
    stored = checkpoint.skeleton()  # first: the task changes its config
    tokenizer, config = fitted(checkpoint, task, source), checkpoint.config
    auto = "AutoModelForSeq2SeqLM" if getattr(task, "encoder", False) else task.auto
    for key, value in task.config().items():
        setattr(config, key, value)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    try:
        with init_empty_weights(include_buffers=False) if quantised else contextlib.nullcontext():
            model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise SupremumError(f"{source}: Transformers has no {auto} for a {config.model_type} model.",
                            "Choose another base model for this task.") from error
    whole = type(stored) is type(model)
    given, taken = (stored, model) if whole else (stored.base_model, model.base_model)
    inside, outside = (_prefix(side, part) for side, part in ((model, taken), (stored, given)))
    shapes = {name: value.shape for name, value in given.state_dict().items()}
    fitting = {name: outside + name for name, value in taken.state_dict().items() if shapes.get(name) == value.shape}
    missing = [name for name in taken.state_dict() if name not in fitting and "pooler" not in name]
    if taken is not model and missing:
        raise SupremumError(f"{source}: has no weights for {missing[0]}, which {type(model).__name__} needs.",
                            "Choose another base model for this task.")
    if quantised:
        if not keep_quantised(model, blocks(model), checkpoint, {inside + name: there for name, there in fitting.items()}):
            raise SupremumError(f"{source}: way: qlora keeps quantised linear layers as their file has them; the blocks of "
                                "this model have none.",
                                "Quantise it first (supremum optimize MODEL --bits 4), or use way: lora.")
        draw_missing(model)
    model.tie_weights()
    for name, value in taken.state_dict().items():
        if name in fitting:
            value.copy_(checkpoint.read(fitting[name]))
    if whole:
        checkpoint.configure_generation(model)
    return model, tokenizer, checkpoint.fingerprint


def _prefix(model: Any, part: Any) -> str:
    return "" if part is model else f"{model.base_model_prefix}."


def reopen(checkpoint: Checkpoint, task: Task) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint that has the task's head, as it is stored: inputs are rounded where its format says
    so. Raises SupremumError where it has no such head."""
    tokenizer = fitted(checkpoint, task, checkpoint.source)
    model: Any = checkpoint.model(torch.float32)
    if task.auto == "AutoModel":  # vectors are the trunk's
        model = model.base_model
    _check_head(model, task, checkpoint.source)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _check_head(model: Any, task: Task, source: str) -> None:
    remedy = "Give a folder that `supremum tune` wrote for this task, or what was compressed from one."
    name, kind = type(model).__name__, task.auto.removeprefix("AutoModel")
    if not (model.can_generate() if hasattr(task, "encoder") else name.endswith(kind) or not task.new_head):
        raise SupremumError(f"{source}: a {name} has no head for the task {task.name}.", remedy)
    if task.new_head and task.labels and [model.config.id2label[n] for n in range(model.config.num_labels)] != task.labels:
        raise SupremumError(f"{source}: its head has other labels than the task ({', '.join(task.labels[:8])}).", remedy)


def fitted(checkpoint: Checkpoint, task: Task, source: str) -> Any:
    """The tokenizer, with a token for padding; the task learns what it must know of the model."""
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise SupremumError(f"{source}: the tokenizer has no token for padding.", "Name one in tokenizer_config.json.")
    if hasattr(task, "encoder"):
        task.encoder = bool(getattr(config, "is_encoder_decoder", False))
    _fit_length(task, config)
    return tokenizer


def scratch(recipe: Model, tokens: TokenizerRecipe, task: Task, rows: Sequence[Row], seed: int) -> tuple[Any, Any, str]:
    """(model with random weights, tokenizer, fingerprint of what the tokenizer learnt)."""
    own = FAMILIES[recipe.family][0]
    writes = hasattr(task, "encoder")
    if writes and own not in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM"):
        raise SupremumError(f"model.family: {recipe.family} reads and does not write; {task.name} writes.",
                            "Use marian, t5, gpt2 or llama.")
    if hasattr(task, "encoder"):
        task.encoder = own == "AutoModelForSeq2SeqLM"
    if tokens.name in MADE:
        tokenizer = trained(tokens, lambda: _texts(task, rows), objective_of(recipe.family), task.settings.get("length", 512))
    else:
        tokenizer = loaded(tokens)
    torch.manual_seed(seed)
    model = build(recipe, tokenizer, own if writes else task.auto, task.config())
    _fit_length(task, model.config)
    return model, tokenizer, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _texts(task: Task, rows: Sequence[Row]) -> Iterator[str]:
    """All that the rows say, labels left out."""
    for row in rows:
        for role in task.roles:
            if role not in ("label", "tags"):
                yield " ".join(row[role]) if isinstance(row[role], list) else row[role]


def _fit_length(task: Task, config: Any) -> None:
    most = getattr(config, "max_position_embeddings", None)
    if most and "length" in task.settings and task.settings["length"] > most - 2:
        task.settings["length"] = most - 2
