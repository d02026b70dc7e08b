"""A model run block by block, so that one block's weights are in memory and not the model's.

The model is Transformers' own module tree with its parameters on the meta device. Its repeated blocks (the largest
ModuleList) are replaced by stand-ins that record the arguments they are called with: Transformers computes embeddings,
positions and masks as always, and every block can then be run alone with exactly those arguments. This needs no table of
architectures and follows models whose layers differ (Gemma's sliding windows) or repeat (ALBERT's shared layer).

Letters: N windows, T tokens of a window, d hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint import Checkpoint
from ..checkpoint.architecture import objective
from ..codecs.activations import round_inputs
from ..errors import CheckpointError

LINEAR = (nn.Linear, Conv1D)


class _Finished(Exception):
    """Raised by the last stand-in: all that comes before the blocks has run."""


class _StandIn(nn.Module):
    """Stands where a block was; records its arguments and hands its input on."""

    def __init__(self, name: str, stream: BlockStream) -> None:
        super().__init__()
        self.name = name
        self._stream = [stream]  # in a list, so that nn.Module does not register it

    def forward(self, hidden_NTd: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._stream[0]._called(self.name, hidden_NTd, args, kwargs)


class _Zeros(nn.Module):
    """Stands where the embedding was when only what follows the blocks matters: no table is loaded."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, tokens_NT: Tensor) -> Tensor:
        return torch.zeros(*tokens_NT.shape, self.width, dtype=self.dtype)


@dataclass(frozen=True)
class Call:
    """One use of a block, in the model's own order: `block` is its name, the rest what it is called with."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Callable[..., Tensor], hidden_NTd: Tensor) -> Tensor:
        """The hidden states that leave `block`, the module of that name or what stands for it."""
        return block(hidden_NTd, *self.args, **self.kwargs)


class BlockStream:
    """A checkpoint's model as embedding, a list of block calls, and the rest."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.model = checkpoint.skeleton().eval()
        self.model.config.use_cache = False
        self.list_name, blocks = _repeated_blocks(self.model)
        self.blocks: dict[str, nn.Module] = {}
        for i, block in enumerate(list(blocks)):
            name = f"{self.list_name}.{i}"
            self.blocks[name] = block
            blocks[i] = _StandIn(name, self)
        self.depth: int = self.model.config.get_text_config().num_hidden_layers
        self.replaced: Callable[[str], Tensor | None] = lambda name: None  # name -> weight (O, I), or vector, to use instead
        self.codec: Callable[[str], str | None] = lambda name: None  # its codec, which may round the layer's inputs too
        self._calls: list[Call] = []
        self._final_NTd: Tensor | None = None
        self._first_NTd: Tensor | None = None

    # -- what comes before and after the blocks ---------------------------------------------------------------------

    def calls(self, tokens_NT: Tensor) -> list[Call]:
        """How the blocks are called for windows of this length (one window's masks; they broadcast)."""
        self.embed(tokens_NT[:1])
        return list(self._calls)

    def embed(self, tokens_NT: Tensor) -> Tensor:
        """Hidden states (N, T, d) that enter the first block."""
        self._calls, self._final_NTd = [], None
        with self._rest_loaded(self.model), contextlib.suppress(_Finished), torch.no_grad():
            self.model(input_ids=tokens_NT)
        assert self._first_NTd is not None
        return self._first_NTd.to(self.dtype)

    def embedding_gradient(self, tokens_NT: Tensor, upper_NTd: Tensor) -> Tensor:
        """From the gradient at the first block's input to that at the table's rows: (N, T, e), a row a position.

        What lies between (a scale, added positions, a norm, a projection) is differentiated, not assumed.
        """
        table: Any = self.model.get_input_embeddings()
        rows: list[nn.Parameter] = []

        def look_up(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            rows.append(nn.Parameter(table.weight[tokens_NT.flatten()]))
            table.weight = rows[0]
            return (torch.arange(tokens_NT.numel()).view(tokens_NT.shape),)

        stored, padding, table.padding_idx = table.weight, table.padding_idx, None  # no row is exempt from change
        self._calls, self._final_NTd = [], None
        with self._rest_loaded(self.model), torch.enable_grad():
            hook = table.register_forward_pre_hook(look_up)  # runs after the hook that loads the table
            try:
                with contextlib.suppress(_Finished):
                    self.model(input_ids=tokens_NT)
            finally:
                hook.remove()
                table.weight, table.padding_idx = stored, padding
            assert self._first_NTd is not None
            gradient_Pe, = torch.autograd.grad(self._first_NTd, rows, upper_NTd.to(self._first_NTd.dtype))
        self._first_NTd = None
        return gradient_Pe.view(*tokens_NT.shape, -1)

    @contextlib.contextmanager
    def head(self) -> Iterator[Any]:
        """Yield `head(hidden_NTd) -> output (N, T, V or d)`: everything after the last block, with gradient if wanted. A
        task's head (a class, tags, a marked answer) is left out: it stays as it is, and texts are not its inputs."""
        whole: Any = self.model if objective(type(self.model).__name__) != "none" else self.model.base_model
        embedding = self.model.get_input_embeddings()
        if not self.checkpoint.tied:
            self.model.set_input_embeddings(_Zeros(embedding.weight.shape[1], self.dtype))

        def run(hidden_NTd: Tensor) -> Tensor:
            self._calls, self._final_NTd = [], hidden_NTd
            tokens_NT = torch.zeros(hidden_NTd.shape[:2], dtype=torch.long)
            output = whole(input_ids=tokens_NT)
            self._final_NTd = None
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
        head = None if layer is None else f"{names[layer]}.weight"
        return f"{names[self.model.get_input_embeddings()]}.weight", self.checkpoint.tied.get(head, head) if head else None

    def tables(self) -> list[str]:
        """Tensor names of the embedding and the head, once each."""
        return list(dict.fromkeys(name for name in self.table_names() if name is not None))

    def _called(self, name: str, hidden_NTd: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not self._calls:
            self._first_NTd = hidden_NTd
        self._calls.append(Call(name, args, kwargs))
        if len(self._calls) < self.depth:
            return hidden_NTd
        if self._final_NTd is None:
            raise _Finished
        return self._final_NTd

    @contextlib.contextmanager
    def _rest_loaded(self, root: nn.Module) -> Iterator[None]:
        """Load a module's own parameters when it is first called, and release all of them on leaving."""
        loaded: list[nn.Module] = []
        names = {module: name for name, module in root.named_modules()}

        def load(module: nn.Module, args: Any) -> None:
            if module in loaded:
                return
            loaded.append(module)
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    name = f"{names[module]}.{key}".lstrip(".")
                    weight = self.replaced(self.checkpoint.tied.get(name, name))
                    weight = self.checkpoint.read(name) if weight is None else weight
                    module._parameters[key] = nn.Parameter(weight.to(self.dtype), requires_grad=False)

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


def _repeated_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds most of the parameters: the model's blocks."""
    lists = [(sum(p.numel() for p in m.parameters()), -len(name), name, m)
             for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
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
