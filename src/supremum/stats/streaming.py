"""A model run block by block, so that one block's weights are in memory and not the model's.

The model is Transformers' own module tree with its parameters on the meta device. Its repeated blocks (the largest
ModuleList) are replaced by stand-ins that record the arguments they are called with and hand their input on: Transformers
computes embeddings, positions and masks as always, and every block can then be run alone with exactly those arguments.
This needs no table of architectures and follows models whose layers differ (Gemma's sliding windows), repeat (ALBERT's
shared layer) or are given a bias that the first of them computed (T5). Of an encoder-decoder the blocks are the encoder's
and then the decoder's; calls.py says what a call does with the hidden state.

Letters: N windows, T tokens of a window, d hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint import Checkpoint
from ..checkpoint.architecture import has_position_bias, objective
from ..codecs.activations import round_inputs
from ..errors import CheckpointError
from ..text.pairs import inputs
from .calls import READ, Call, SideCall

LINEAR = (nn.Linear, Conv1D)


class _Finished(Exception):
    """Raised by the last stand-in: all that comes before the blocks has run."""


class _StandIn(nn.Module):
    """Stands where a block was; records its arguments and hands its input on."""

    def __init__(self, name: str, stream: BlockStream) -> None:
        super().__init__()
        self.name = name
        self._stream = [stream]  # in a list, so that nn.Module does not register it

    def forward(self, hidden_NTd: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._stream[0]._called(self.name, hidden_NTd, args, kwargs)


class _Zeros(nn.Module):
    """Stands where the embedding was when only what follows the blocks matters: no table is loaded."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, tokens_NT: Tensor) -> Tensor:
        return torch.zeros(*tokens_NT.shape, self.width, dtype=self.dtype)


class BlockStream:
    """A checkpoint's model as embedding, a list of block calls, and the rest."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.model = checkpoint.skeleton().eval()
        self.model.config.use_cache = False
        self.pairs = bool(self.model.config.is_encoder_decoder)
        lists = [_repeated_blocks(self.model, part) for part in
                 ([self.model.get_encoder(), self.model.get_decoder()] if self.pairs else [self.model])]
        self.list_name = lists[0][0]
        self.blocks: dict[str, nn.Module] = {}
        for list_name, blocks in lists:
            for i, block in enumerate(list(blocks)):
                name = f"{list_name}.{i}"
                self.blocks[name] = block
                blocks[i] = _StandIn(name, self)
        self._firsts = [f"{list_name}.0" for list_name, _ in lists]  # of the encoder and of the decoder
        self.depth: int = len(self.blocks) if self.pairs else self.model.config.get_text_config().num_hidden_layers
        self.replaced: Callable[[str], Tensor | None] = lambda name: None  # name -> weight (O, I), or vector, to use instead
        self.codec: Callable[[str], str | None] = lambda name: None  # its codec, which may round the layer's inputs too
        self._calls: list[Call] = []
        self._entries: list[Tensor] = []  # what enters the first block, of the encoder and of the decoder
        self._given: dict[str, Tensor] = {}  # block name -> what it gives, where only what follows it matters
        self._biased = [name for name, block in self.blocks.items() if has_position_bias(block)]
        self._biases: tuple[Any, ...] = (None, None)  # what the last of them handed on: for its own side, and for the other
        if self.pairs:
            self._check_sides()
            self._read_NTd: Tensor | None = None  # what the encoder gave
            self.model.get_encoder().register_forward_hook(
                lambda module, args, output: setattr(self, "_read_NTd", output.last_hidden_state))

    # -- what comes before and after the blocks ---------------------------------------------------------------------

    def calls(self, windows_NT: Tensor) -> list[Call]:
        """How the blocks are called for these windows (of one text: for windows of their length)."""
        self.embed(windows_NT if self.pairs else windows_NT[:1])
        return list(self._calls)

    def embed(self, windows_NT: Tensor) -> Tensor:
        """Hidden states (N, T, d) that enter the first block."""
        with self._rest_loaded(self.model), torch.no_grad():
            return self._enter(windows_NT).to(self.dtype)

    def _enter(self, windows_NT: Tensor) -> Tensor:
        """Run all that comes before the blocks, which leaves their calls."""
        self._calls, self._entries, self._windows_NT = [], [], windows_NT
        with contextlib.suppress(_Finished):
            self.model(**inputs(windows_NT), use_cache=False) if self.pairs else self.model(input_ids=windows_NT)
        return torch.cat(self._entries, 1) if self.pairs else self._entries[0]

    def embedding_gradient(self, windows_NT: Tensor, upper_NTd: Tensor) -> Tensor:
        """From the gradient at the first block's input to that at the table's rows: (N, T, e), a row a position.

        What lies between (a scale, added positions, a norm, a projection) is differentiated, not assumed.
        """
        name, _ = self.table_names()
        tables = [module for place, module in self.model.named_modules() if isinstance(module, nn.Embedding)
                  and self._canonical(f"{place}.weight") == name]
        rows: list[nn.Parameter] = []
        whole: dict[nn.Module, Tensor] = {}  # a table that both sides use is looked up twice

        def look_up(table: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            rows.append(nn.Parameter(whole.setdefault(table, table.weight)[args[0].flatten()]))
            table.weight = rows[-1]
            return (torch.arange(args[0].numel()).view(args[0].shape),)

        stored = [(table.weight, table.padding_idx) for table in tables]
        with self._rest_loaded(self.model), torch.enable_grad():
            hooks = [table.register_forward_pre_hook(look_up) for table in tables]  # run after those that load the tables
            for table in tables:
                table.padding_idx = None  # no row is exempt from change
            try:
                entry_NTd = self._enter(windows_NT)
            finally:
                for hook in hooks:
                    hook.remove()
                for table, (weight, padding) in zip(tables, stored, strict=True):
                    table.weight, table.padding_idx = weight, padding
            found = torch.autograd.grad(entry_NTd, rows, upper_NTd.to(entry_NTd.dtype))
        self._entries = []
        return torch.cat([gradient_Pe.view(len(windows_NT), -1, gradient_Pe.shape[1]) for gradient_Pe in found], 1)

    @contextlib.contextmanager
    def head(self) -> Iterator[Any]:
        """Yield `head(hidden_NTd) -> output (N, T, V or d)`: everything after the last block, with gradient if wanted. A
        task's head (a class, tags, a marked answer) is left out: it stays as it is, and texts are not its inputs."""
        whole: Any = self.model if objective(type(self.model).__name__) != "none" else self.model.base_model
        embedding = self.model.get_input_embeddings()
        if not self.checkpoint.tied:
            self.model.set_input_embeddings(_Zeros(embedding.weight.shape[1], self.dtype))

        last = list(self.blocks)[-1]

        def run(hidden_NTd: Tensor) -> Tensor:
            tokens_NT = torch.zeros(hidden_NTd.shape[:2], dtype=torch.long)
            with self._giving(last, hidden_NTd):
                output = whole(encoder_outputs=(hidden_NTd,), decoder_input_ids=tokens_NT) if self.pairs else \
                    whole(input_ids=tokens_NT)
            return output.logits if "logits" in output else output.last_hidden_state

        try:
            with self._rest_loaded(self.model):
                yield run
        finally:
            self.model.set_input_embeddings(embedding)

    # -- the blocks -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """The block with its weights in memory (compute dtype, no gradients), released on leaving."""
        block = self.blocks[name]
        for inner in [inner for inner, _ in block.named_parameters()]:
            if (value := self.replaced(f"{name}.{inner}")) is not None:
                owner, _, key = inner.rpartition(".")
                _set(block.get_submodule(owner), key, value, self.dtype)
        self.checkpoint.materialise(block, name + ".", self.dtype)
        hooks = [round_inputs(layer, self.codec(f"{name}.{inner}.weight")) for inner, layer in linears(block).items()]
        try:
            yield block.eval().requires_grad_(False)
        finally:
            for hook in filter(None, hooks):
                hook.remove()
            for module in block.modules():
                _release(module)

    def table_names(self) -> tuple[str, str | None]:
        """Tensor names of the embedding table and of the output head (the same if tied; None if there is no head)."""
        names = {module: name for name, module in self.model.named_modules()}
        layer = self.model.get_output_embeddings()
        return self._canonical(f"{names[self.model.get_input_embeddings()]}.weight"), \
            None if layer is None else self._canonical(f"{names[layer]}.weight")

    def tables(self) -> list[str]:
        """Tensor names of the embedding and the head, once each."""
        return list(dict.fromkeys(name for name in self.table_names() if name is not None))

    def _canonical(self, name: str) -> str:
        return self.checkpoint.tied.get(name, name)

    @contextlib.contextmanager
    def _giving(self, name: str, hidden_NTd: Tensor) -> Iterator[None]:
        """Within the context the block gives this, and no call is recorded."""
        self._given = {name: hidden_NTd}
        try:
            yield
        finally:
            self._given = {}

    def _called(self, name: str, hidden_NTd: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the stack is told that a block gave. T5's first block of a side computes a bias of positions that the others
        are given, so this one is run, on one window: a bias depends on places alone."""
        def one(value: Any) -> Any:
            return value[:1] if isinstance(value, Tensor) and len(value) == len(hidden_NTd) else value

        if self._given:
            given_NTd = self._given.get(name, hidden_NTd)
            return (given_NTd, None, None) if self._biased else given_NTd
        if name in self._firsts and len(self._entries) < len(self._firsts):
            self._entries.append(hidden_NTd)
        self._calls.append(self._side(name, args, kwargs) if self.pairs else Call(name, args, kwargs))
        if len(self._calls) == self.depth:
            raise _Finished
        if not self._biased:
            return hidden_NTd
        if name in self._biased:
            with torch.no_grad(), self.block(name) as block:
                self._biases = block(one(hidden_NTd.detach()), *map(one, args),
                                     **{key: one(value) for key, value in kwargs.items()})[1:]
        return (hidden_NTd, *self._biases)

    # -- the two sides of an encoder-decoder ------------------------------------------------------------------------

    def _side(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SideCall:
        """A block's call; where the decoder begins, the encoder's last call gets what follows its block."""
        encoder = len(self._entries) == 1
        if not encoder and name == self._firsts[1]:
            last = self._calls[-1]
            assert isinstance(last, SideCall)
            self._calls[-1] = replace(last, close=self._close)

        def told(value: Any) -> Any:
            return READ if value is self._read_NTd and not encoder else value

        return SideCall(name, tuple(map(told, args)), {key: told(value) for key, value in kwargs.items()}, self._windows_NT,
                        encoder)

    def _close(self, hidden_NTd: Tensor) -> Tensor:
        """What the encoder makes of its last block's output."""
        last = [name for name in self.blocks if name.startswith(f"{self.list_name}.")][-1]
        with self._rest_loaded(self.model), self._giving(last, hidden_NTd):
            found: Tensor = self.model.get_encoder()(inputs_embeds=torch.zeros_like(hidden_NTd)).last_hidden_state
        return found

    def _check_sides(self) -> None:
        """Raises CheckpointError for an encoder-decoder that is not read as one text and written as another."""
        names = {module: name for name, module in self.model.named_modules()}
        parts = (self.model, self.model.get_encoder(), self.model.get_decoder())
        tables = {self._canonical(f"{names[part.get_input_embeddings()]}.weight") for part in parts}
        cause = ""
        if self.model.main_input_name != "input_ids" or self.model.get_output_embeddings() is None:
            cause = "does not read text and write text"
        elif len(tables) > 1:
            cause = "its encoder and its decoder look tokens up in tables of their own"
        elif not set(self._biased) <= set(self._firsts):
            cause = "each of its blocks has a position bias of its own"
        if cause:
            raise CheckpointError(f"{self.checkpoint.source}: {cause}; it cannot be run block by block.",
                                  "Supremum compresses encoder-decoders as Marian, BART and T5 are built; `supremum "
                                  "evaluate` scores others, too.")

    @contextlib.contextmanager
    def _rest_loaded(self, root: nn.Module) -> Iterator[None]:
        """Load a module's own parameters when it is first called, and release all of them on leaving."""
        loaded: list[nn.Module] = []
        names = {module: name for name, module in root.named_modules()}

        def load(module: nn.Module, args: Any) -> None:
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    name = f"{names[module]}.{key}".lstrip(".")
                    weight = self.replaced(self._canonical(name))
                    weight = self.checkpoint.read(name) if weight is None else weight
                    module._parameters[key] = nn.Parameter(weight.to(self.dtype), requires_grad=False)
                    loaded.append(module)

        hooks = [m.register_forward_pre_hook(load) for m in names
                 if next(m.parameters(recurse=False), None) is not None]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in loaded:
                _release(module)


def _release(module: nn.Module) -> None:
    """Move the module's own parameters to the meta device; its buffers are not stored anywhere and stay."""
    for key, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _repeated_blocks(model: nn.Module, part: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList of a part of the model that holds most of the parameters: its blocks."""
    inside = set(part.modules())
    lists = [(sum(p.numel() for p in m.parameters()), -len(name), name, m)
             for name, m in model.named_modules() if m in inside and isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise CheckpointError(f"{type(model).__name__} has no repeated blocks.",
                              "Supremum works on transformer decoders and encoders.")
    _, _, name, blocks = max(lists, key=lambda item: item[:2])
    return name, blocks


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The block's linear layers by their names inside it."""
    return {name: m for name, m in block.named_modules() if isinstance(m, LINEAR)}


def set_weight(layer: nn.Module, weight_OI: Tensor) -> None:
    """Give a linear layer another weight, (out, in)."""
    _set(layer, "weight", weight_OI, next(layer.parameters(recurse=False)).dtype)


def _set(module: nn.Module, key: str, value: Tensor, dtype: torch.dtype) -> None:
    """Transformers' Conv1D (GPT-2) stores the transpose of a weight (out, in)."""
    value = value.T.contiguous() if isinstance(module, Conv1D) and value.ndim == 2 else value
    module._parameters[key] = nn.Parameter(value.to(dtype), requires_grad=False)


def read_weight(checkpoint: Checkpoint, name: str, turned: bool) -> Tensor:
    """A matrix (O, I), float32. turned: whether the checkpoint stores the transpose."""
    stored = checkpoint.read(name).float()
    return stored.T.contiguous() if turned else stored


def orientation(stream: BlockStream) -> dict[str, tuple[tuple[int, int], bool]]:
    """Of every matrix that can be compressed: tensor name -> ((out, in), whether the checkpoint stores the transpose)."""
    found: dict[str, tuple[tuple[int, int], bool]] = {}
    for name, block in stream.blocks.items():
        for inner, layer in linears(block).items():
            rows, columns = layer.weight.shape  # type: ignore[misc]
            turned = isinstance(layer, Conv1D)
            found[f"{name}.{inner}.weight"] = ((columns, rows) if turned else (rows, columns)), turned
    for table in stream.tables():
        info = stream.checkpoint.tensors[table]
        found[table] = (info.shape[0], info.shape[1]), False
    return found
