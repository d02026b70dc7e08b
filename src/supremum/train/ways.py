"""What of a model is trained: all of it, its head, its blocks from the top down, or an adapter that is merged at the end.

    lora     W + (alpha / r) B A                      A (r, I), B (O, r); Hu et al. 2021, arXiv:2106.09685
    qlora    the same, W quantised                    quantised.py; Dettmers et al. 2023, arXiv:2305.14314
    adalora  W + P diag(lambda) Q                     ranks pruned to a budget; Zhang et al. 2023, arXiv:2303.10512
    ia3      keys, values and FFN inputs scaled       one vector each; Liu et al. 2022, arXiv:2205.05638
    prompt   n vectors before the embedded input      rows of the embedding in the end: prompt.py
    gradual  the top block first, then the next       Howard and Ruder 2018, arXiv:1801.06146

Adapters are PEFT's. All of them end in a plain model: `merged` adds them to the weights that they change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import SupremumError
from ..stats.streaming import LINEAR
from .quantised import fold_adapters, quantised_layers
from .recipe import limits

ADAPTERS = ("lora", "qlora", "adalora", "ia3", "prompt")  # ways that are PEFT's
TRAINED, RANKS = "trained", "ranks"  # kinds of entries of an adapter's state
IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the others: AdaLoRA's running means, as PEFT's allocator names them


@dataclass(frozen=True)
class Way:
    name: Literal["full", "frozen", "gradual", "lora", "qlora", "adalora", "ia3", "prompt"] = "full"
    rank: int = limits(8, least=1)  # lora and qlora, and where adalora ends on average (it begins at 1.5 times as many)
    alpha: int = limits(16, least=1)
    dropout: float = limits(0.0, least=0, most=0.99)  # of the adapter's input
    targets: tuple[str, ...] = ()  # ends of layer names; all linear layers of the blocks for lora, qlora and adalora
    tokens: int = limits(20, least=1, most=512)  # prompt: its length
    share: float = limits(0.5, above=0, most=1)  # gradual: share of the steps by whose end every block is trained


def trunk(model: Any) -> nn.Module:
    """The model without its head."""
    found: nn.Module = model.base_model
    return found


def head(model: Any) -> list[str]:
    """Names of the modules that a new task trains from nothing: those beside the trunk, and a pooler in it."""
    if trunk(model) is model or model.get_output_embeddings() is not None:
        return []
    prefix = model.base_model_prefix
    return [name for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())] + (
        [f"{prefix}.pooler"] if getattr(trunk(model), "pooler", None) is not None else [])


def blocks(model: Any) -> list[nn.Module]:
    """The trunk's blocks, bottom first: its longest list of modules that is inside no other; of an encoder-decoder the
    encoder's, then the decoder's."""
    base: Any = trunk(model)
    found: list[nn.Module] = []
    for stack in [base.encoder, base.decoder] if hasattr(base, "encoder") and hasattr(base, "decoder") else [base]:
        lists = [module for module in stack.modules() if isinstance(module, nn.ModuleList)]
        inner = {below for one in lists for below in one.modules() if below is not one}
        outer = [one for one in lists if one not in inner]
        if not outer:
            raise SupremumError("The model has no list of blocks to adapt or unfreeze.", "Use way: full.")
        longest: nn.ModuleList = max(outer, key=len)
        found += longest
    return found


def prepare(model: Any, way: Way, steps: int, prompt: Sequence[int] = ()) -> tuple[Any, list[TrainerCallback]]:
    """The model as it will be trained, and what must run beside the training. prompt: ids of its tokens (prompt.py)."""
    names = head(model)
    check_way(way, bare=not names)
    if way.name == "full":
        return model, []
    if way.name == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"{one}.") for one in names))
        for module in trunk(model).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the features stay the same; the head keeps its dropout
        return model, []
    if way.name == "gradual":
        return model, [Unfreeze(model, way.share, steps)]
    return _adapted(model, way, steps, prompt)


def check_way(way: Way, where: str = "", *, bare: bool) -> None:
    """Refuse what is known of a way without its model; bare: the task puts no new head on the trunk."""
    if way.name == "frozen" and bare:
        raise SupremumError(f"{where}way: frozen trains a head alone, and this task adds none.", "Use lora or ia3.")
    if way.name in ADAPTERS and not find_spec("peft"):
        raise SupremumError(f"{where}way: {way.name} needs peft, which is not installed.", "pip install 'supremum[train]'")


def _adapted(model: Any, way: Way, steps: int, prompt: Sequence[int]) -> tuple[Any, list[TrainerCallback]]:
    import peft

    heads = [model.get_submodule(name) for name in head(model)]
    names = [name for name, module in model.named_modules() if isinstance(module, LINEAR)
             and (not way.targets or re.search(rf"(^|\.)({'|'.join(map(re.escape, way.targets))})$", name))]
    if way.targets and not names:
        raise SupremumError(f"way.targets: no linear layer ends in {' or '.join(way.targets)}.",
                            f"There are {', '.join(sorted(_ends(model)))}.")
    within = {id(module) for block in blocks(model) for module in block.modules()}
    names = [name for name in names if id(model.get_submodule(name)) in within]
    if way.name in ("lora", "qlora"):
        found: Any = peft.LoraConfig(r=way.rank, lora_alpha=way.alpha, lora_dropout=way.dropout, target_modules=names)
    elif way.name == "adalora":
        found = peft.AdaLoraConfig(init_r=max(2, way.rank * 3 // 2), target_r=way.rank, lora_alpha=way.alpha,
                                   lora_dropout=way.dropout, target_modules=names, total_step=steps, tinit=steps // 10,
                                   tfinal=max(1, steps // 3), deltaT=max(1, steps // 100))
    elif way.name == "prompt":
        found = peft.TrainableTokensConfig(token_indices=list(prompt))
    else:
        found = peft.IA3Config(target_modules=list(way.targets) or None)
        if way.targets:
            found.feedforward_modules = []
    try:
        adapted = peft.get_peft_model(model, found)
    except ValueError as error:
        raise SupremumError(f"way: {way.name}: {error}", "Name the layers with way.targets.") from error
    for part in heads:
        part.requires_grad_(True)  # drawn from the seed, so trained whole
    return adapted, [Budget()] if way.name == "adalora" else []


def _ends(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LINEAR)}


def merged(model: Any) -> Any:
    """The plain model: adapters added to the weights that they change."""
    fold_adapters(model)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def adapter_state(model: Any) -> dict[str, Tensor] | None:
    """All that training changes of a model under an adapter, for a checkpoint; None without an adapter.

    PEFT's own files hold the adapter alone: neither a head that is trained beside it, nor how AdaLoRA came to its ranks."""
    if not hasattr(model, "merge_and_unload"):
        return None
    state = {f"{TRAINED}|{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if (allocator := getattr(model.base_model, "rankallocator", None)) is not None:
        state |= {f"{key}|{name}": value for key in IMPORTANCE for name, value in getattr(allocator, key).items()}
        state |= {f"{RANKS}|{name}": torch.tensor(kept)
                  for name, kept in (allocator.peft_config.rank_pattern or {}).items()}
    return {name: value.contiguous() for name, value in state.items()}


def restore_adapter(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put back what `adapter_state` gave, in place."""
    split: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("|")
        split.setdefault(kind, {})[name] = value
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in split[TRAINED].items():
        trained[name].data.copy_(value)
    if (allocator := getattr(model.base_model, "rankallocator", None)) is not None:
        for key in IMPORTANCE:
            setattr(allocator, key, split.get(key, {}))
        if RANKS in split:
            allocator.peft_config.rank_pattern = {name: kept.tolist() for name, kept in split[RANKS].items()}


def counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes: Sequence[tuple[int, bool]] = [(p.numel(), p.requires_grad) for p in model.parameters()]
    kept = sum(layer.in_features * layer.out_features for layer in quantised_layers(model).values())
    return sum(size for size, trained in sizes if trained), kept + sum(size for size, _ in sizes)


class Unfreeze(TrainerCallback):
    """Blocks join from the top, evenly over `share` of the steps; the embeddings join last. The head trains from the start.

    Everything is in the optimiser from the start; a parameter without a gradient is passed over.
    """

    def __init__(self, model: Any, share: float, steps: int) -> None:
        below = list(trunk(model).named_parameters())
        inside = [list(block.parameters()) for block in reversed(blocks(model))]
        placed = {id(p) for group in inside for p in group}
        kept = [name.removeprefix(f"{model.base_model_prefix}.") for name in head(model)]
        rest = [p for name, p in below if id(p) not in placed and not any(name.startswith(f"{one}.") for one in kept)]
        self.groups = [*inside, rest]
        self.every = max(1.0, share * steps / len(self.groups))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        open_now = int(state.global_step / self.every)
        for place, group in enumerate(self.groups):
            for parameter in group:
                parameter.requires_grad_(place < open_now)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for parameter in (p for group in self.groups for p in group):
            parameter.requires_grad_(True)


class Budget(TrainerCallback):
    """AdaLoRA moves its ranks after every step, while the gradients are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)
