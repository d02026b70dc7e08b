"""An opened checkpoint: what every format offers, told once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..codecs.activations import round_inputs, rounder
from ..errors import CheckpointError
from .architecture import TensorInfo, build, resolve


class Store(Protocol):
    """One format's tensors under the names that it gives them."""

    @property
    def entries(self) -> Mapping[str, TensorInfo]:
        """The stored tensors by stored name."""

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own: stored dtype, or float32 when it was quantised."""

    def file(self, name: str) -> Path:
        """The file that holds the tensor, for messages."""


class Checkpoint:
    """A model on disk, opened strictly and read lazily: names and shapes were checked, no weight is in memory yet."""

    def __init__(
        self,
        *,
        source: str,
        path: Path,
        format: str,
        config: PretrainedConfig,
        config_path: Path,
        store: Store,
        files: Sequence[Path],
        load_tokenizer: Callable[[], Any],
    ) -> None:
        self.source = source
        self.path = path
        self.format = format
        self.config = config
        self.files = tuple(files)  # everything that the fingerprint covers
        self._config_path = config_path
        self._store = store
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Any = None
        self._change: Callable[[str, Tensor], Tensor] | None = None
        self._pooling = any("pooler" in name for name in store.entries)
        shapes = build(config, config_path, pooling=self._pooling, real_buffers=False)
        names = resolve(shapes, store.entries, path)
        self.tensors: Mapping[str, TensorInfo] = names.tensors
        self.tied = names.tied
        self.unused = names.unused  # stored, but of a pre-training head that this architecture does not have
        self._stored = names.stored
        for one, other in names.twins:
            if not torch.equal(store.read(one), store.read(other)):
                raise CheckpointError(
                    f"{store.file(one)}: {one} and {other} differ, but the config ties them.",
                    'Set "tie_word_embeddings": false in config.json if they are meant to differ.',
                )

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {self.format}, {type(self.config).__name__}, {len(self.tensors)} tensors)"

    def read(self, name: str) -> Tensor:
        """The tensor `name` (canonical or tied name) in memory of its own, checked to be finite.

        Stored dtype for float tensors, float32 for quantised ones. Raises CheckpointError for NaN or Inf.
        """
        stored = self._stored[self.tied.get(name, name)]
        tensor = self._store.read(stored)
        if tensor.is_floating_point() and tensor.numel():
            values = tensor if tensor.itemsize > 1 else tensor.float()  # float8 has no reductions
            low, high = torch.aminmax(values)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise CheckpointError(
                    f"{self._store.file(stored)}: tensor {stored} holds NaN or Inf.",
                    "The weights are damaged; download the model again or use another checkpoint.",
                )
        return tensor if self._change is None else self._change(self.tied.get(name, name), tensor)

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Checkpoint:
        """The same model with other weights: `read` gives change(canonical name, tensor), of the same shape. A model that was
        changed already is changed further."""
        view, earlier = copy.copy(self), self._change
        view._change = change if earlier is None else lambda name, tensor: change(name, earlier(name, tensor))
        return view

    def lattice(self, name: str) -> Any:
        """Of an archive: (codecs.lattice.Lattice of the tensor, whether the tensor is its transpose)."""
        return self._store.lattice(self._stored[name])  # type: ignore[attr-defined]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of config, weights and tokenizer."""
        total = hashlib.sha256()
        for path in sorted(self.files, key=lambda p: p.name):
            with path.open("rb") as file:
                total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                while chunk := file.read(1 << 22):
                    total.update(chunk)
        return total.hexdigest()

    def tokenizer(self) -> Any:
        """The tokenizer (PreTrainedTokenizerBase), loaded once; chat templates run in Transformers' sandbox only."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def skeleton(self) -> PreTrainedModel:
        """The module tree in eval mode: parameters on the meta device, buffers (rotary frequencies, ...) real.

        Layers that are stored so that they round their inputs do."""
        model = build(self.config, self._config_path, pooling=self._pooling)
        for name, info in self.tensors.items():
            if rounder(info.kind):
                round_inputs(model.get_submodule(name.removesuffix(".weight")), info.kind)
        return model

    def materialise(self, module: nn.Module, prefix: str = "", dtype: torch.dtype | None = torch.float32) -> None:
        """Give `module`'s meta parameters their weights, in place, as `dtype` (None: as stored).

        `prefix`: the module's place in the tree ("model.layers.3", with or without a dot at the end; "" for the whole).
        Tied parameters inside the module stay one parameter.
        """
        prefix = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
        done: dict[str, nn.Parameter] = {}
        for path, owner in module.named_modules():
            place = f"{prefix}{path}." if path else prefix
            for key, parameter in owner._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                name = self.tied.get(place + key, place + key)
                if name not in done:
                    done[name] = nn.Parameter(self.read(name).to(dtype), requires_grad=parameter.requires_grad)
                owner._parameters[key] = done[name]
            for key in owner._buffers.keys() - owner._non_persistent_buffers_set:
                if place + key in self.tensors:
                    owner._buffers[key] = self.read(place + key)

    def model(self, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
        """The whole model in memory, tied, in eval mode."""
        model = self.skeleton()
        self.materialise(model, "", dtype)
        self.configure_generation(model)
        return model

    def configure_generation(self, model: PreTrainedModel) -> None:
        """Give a model that writes the stored generation_config.json; Transformers' defaults stay where there is none."""
        path = self.path / "generation_config.json"
        if getattr(model, "generation_config", None) is None or not path.is_file():
            return
        try:
            model.generation_config = GenerationConfig.from_pretrained(self.path)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).", "Repair or delete it.") from error
