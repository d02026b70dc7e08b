"""From a config to a module tree, and from the names in a file to the names in that tree.

Architectures are Transformers' own: `config.architectures[0]` names the class, its state dict says which tensors must
exist and in which shapes, its tied keys which of them are one, its conversion mapping which old names mean which new
ones. Nothing here knows a model family by name.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import CheckpointError

# Buffers that older versions of Transformers stored; they are computed from the config today.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|token_type_ids|attn\.(masked_)?bias)$")
HEADS = re.compile(r"(ForPreTraining|ForMaskedLM|ForCausalLM|LMHeadModel|(?<!PreTrained)Model)$")
AUTO_CLASSES = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
                "ForMaskedLM": "AutoModelForMaskedLM", "ForPreTraining": "AutoModelForPreTraining",
                "MTModel": "AutoModelForSeq2SeqLM", "Model": "AutoModel"}
COUNTS = {"num_labels": 1 << 16, "num_experts": 1 << 12, "num_local_experts": 1 << 12, "num_hidden_groups": 1 << 12}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
SIZES = (
    "vocab_size", "hidden_size", "n_embd", "dim", "num_attention_heads", "n_head", "n_heads", "intermediate_size",
    "n_inner", "hidden_dim", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `kind`: how it is stored ("BF16", "Q4_1", "int4-g64"); `nbytes`: what that takes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Names:
    """Which stored tensor is which: `tensors` and `stored` by canonical name, in the order of the module tree."""

    tensors: dict[str, TensorInfo]
    stored: dict[str, str]
    tied: dict[str, str]
    unused: tuple[str, ...]
    twins: tuple[tuple[str, str], ...]  # pairs of stored names that the config says are one tensor


def model_class(config: PretrainedConfig, path: Path) -> type[PreTrainedModel]:
    """The Transformers class that `config.architectures` names."""
    names = getattr(config, "architectures", None)
    if not isinstance(names, (list, tuple)) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{path}: `architectures` names no model class.",
            'Add it, for instance "architectures": ["LlamaForCausalLM"].',
        )
    if names[0].endswith("ForPreTraining") and names[0] != "ElectraForPreTraining":
        raise CheckpointError(f"{path}: a {names[0]} has two heads.", "Save it as the ...ForMaskedLM of its kind.")
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"{path}: Transformers {transformers.__version__} has no architecture {names[0]}.",
            "Upgrade transformers, or use a model that it supports without remote code.",
        )
    if found.config_class is not None and not isinstance(config, found.config_class):
        raise CheckpointError(
            f"{path}: architecture {names[0]} does not belong to model_type {config.model_type!r}.",
            "Repair config.json.",
        )
    return found


def objective(name: str) -> str:
    """What a model class of this name predicts: "next" token, "every" token (a masked-language head), or "none" (hidden
    states only)."""
    if name.endswith("ForMaskedLM"):
        return "every"
    return "next" if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")) else "none"


def auto_class(name: str) -> str:
    """The name in Transformers that users load a model class of this name by; its own where there is none of that kind."""
    return next((auto for end, auto in AUTO_CLASSES.items() if name.endswith(end)), name)


def has_position_bias(module: torch.nn.Module) -> bool:
    """Whether a model or a block computes a bias of relative positions, as T5's do."""
    return any(name.endswith("relative_attention_bias") for name, _ in module.named_modules())


def check_sizes(settings: Mapping[str, Any], path: Path, tensors: int) -> None:
    """Refuse sizes that no model has, before a config or a module is built from them.

    `settings`: config.json or what stands for it; `tensors`: how many the file holds, more than any model has layers.
    """
    for name in (*SIZES, *LAYERS, *COUNTS):
        value = settings.get(name)
        if value is None or isinstance(value, list):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= COUNTS.get(name, 2**31 - 1):
            raise CheckpointError(f"{path}: {name} is {value!r}.", "Repair config.json or download the model again.")
        if name in LAYERS and value > max(tensors, 64):
            raise CheckpointError(
                f"{path}: {value} layers, but the weights hold only {tensors} tensors.",
                "config.json belongs to another model, or shards are missing.",
            )
    for inner in settings.values():
        if isinstance(inner, dict):
            check_sizes(inner, path, tensors)


def build(
    config: PretrainedConfig,
    path: Path,
    *,
    pooling: bool = True,
    real_buffers: bool = True,
    cls: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The module tree with parameters on the meta device, in eval mode.

    `pooling` False leaves out the pooler of an encoder whose file has none. `real_buffers` False allocates nothing at
    all: the shapes of an untrusted config are compared with the file's before any buffer is built from them.
    """
    cls = cls or model_class(config, path)
    options: dict[str, Any] = {}
    if not pooling and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        options["add_pooling_layer"] = False
    try:
        with init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta"):
            model = cls(copy.deepcopy(config), **options)
    except Exception as error:  # whatever a config can make a constructor raise is the file's fault
        raise CheckpointError(
            f"{path}: Transformers cannot build {cls.__name__} from it ({short_reason(error)}).",
            "Repair config.json or download the model again.",
        ) from error
    return model.eval()


def resolve(model: PreTrainedModel, stored: Mapping[str, TensorInfo], path: Path) -> Names:
    """Match the file's names to the module tree's.

    Raises CheckpointError for missing, unexpected and duplicate tensors and for shapes that contradict the config.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ties = {t: s for t, s in model.all_tied_weights_keys.items() if t in expected and s in expected}
    found: dict[str, str] = {}
    unexpected: list[str] = []
    for name, canonical in _renamed(model, expected, stored, path).items():
        if canonical in found:
            raise CheckpointError(
                f"{path}: {name} and {found[canonical]} are both the tensor {canonical}.", "Remove one of them."
            )
        if canonical in expected:
            found[canonical] = name
        elif not COMPUTED.search(name) and not _ignorable(model, name):
            unexpected.append(name)
    unused = _of_siblings(model, unexpected, path) if unexpected else ()
    unexpected = [name for name in unexpected if name not in unused]
    if unexpected:
        raise CheckpointError(
            f"{path}: {len(unexpected)} tensor(s) that {type(model).__name__} does not have, first {unexpected[0]}.",
            "config.json belongs to another model or to fewer layers.",
        )
    twins = []
    for target, source in ties.items():
        if target in found and source in found:
            twins.append((found.pop(target), found[source]))
        elif target in found:
            found[source] = found.pop(target)
    missing = [name for name in expected if name not in found and name not in ties]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensor(s) of {type(model).__name__} are missing, first {missing[0]}.",
            "The file is incomplete, or config.json is of another model.",
        )
    tensors = {}
    for name in expected:
        if name not in found:
            continue
        info = stored[found[name]]
        if info.shape != expected[name]:
            raise CheckpointError(
                f"{path}: {found[name]} has shape {info.shape}, the config says {expected[name]}.",
                "config.json and the weights are not of the same model.",
            )
        tensors[name] = replace(info, name=name)
    return Names(
        tensors,
        {n: found[n] for n in tensors},
        {t: s for t, s in ties.items() if s in found},
        tuple(unused),
        tuple(twins),
    )


def _renamed(
    model: PreTrainedModel, expected: Mapping[str, Any], stored: Mapping[str, TensorInfo], path: Path
) -> dict[str, str]:
    """Stored name -> canonical name by Transformers' own renamings and by the base model's prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters: list[Any] = [t for t in transforms if not isinstance(t, WeightRenaming)]
    names = {}
    for name in sorted(stored):
        if name in expected:
            names[name] = name
            continue
        names[name], converter = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(expected))
        if converter is not None:
            raise CheckpointError(
                f"{path}: {name} is stored in a layout that must be converted first.",
                "Load the model with Transformers 5 and save it again with save_pretrained.",
            )
    return names


def _ignorable(model: PreTrainedModel, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _of_siblings(model: PreTrainedModel, names: list[str], path: Path) -> tuple[str, ...]:
    """Those of `names` that another model of the family has: pre-training heads and poolers left in its file.

    Many published encoders (bert-base-uncased) name a masked language model and carry the next-sentence head too.
    """
    module = sys.modules[type(model).__module__]
    left: list[str] = []
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if not issubclass(cls, PreTrainedModel) or cls is type(model) or not HEADS.search(name):
            continue
        if cls.config_class is not type(model).config_class:
            continue
        sibling = build(model.config, path, cls=cls, real_buffers=False)
        expected = {n: tuple(t.shape) for n, t in sibling.state_dict().items()}
        placeholders = {n: TensorInfo(n, (), "", 0) for n in names}
        left += [n for n, c in _renamed(sibling, expected, placeholders, path).items() if c in expected]
    return tuple(sorted(set(left)))


def short_reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
