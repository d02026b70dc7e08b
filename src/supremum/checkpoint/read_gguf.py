"""GGUF files: the header parsed here, each tensor read and decoded alone, rows put back into the state dict's order.

Names, row order and shifts are those of `gguf_layout`, inverted; block formats are decoded by the `gguf` library, and by
ours where it does not know them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import dequantize
from gguf.quants import _type_traits
from torch import Tensor
from transformers import PretrainedConfig

from .. import codecs
from ..codecs import Coded
from ..errors import CheckpointError
from .architecture import TensorInfo, build, short_reason
from .gguf_config import ROPE_TENSORS, read_config
from .gguf_header import GGUFHeader, GGUFTensor, read_header
from .gguf_layout import Layout
from .gguf_tokenizer import build_tokenizer
from .opened import Checkpoint
from .safetensors_file import read_into

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DECODED = {kind.name: kind for kind in _type_traits}  # by the library
CHUNK = 1 << 22  # weights decoded at once: the decoders make several float32 copies


class GGUFStore:
    """The tensors of a GGUF file under the names, and in the order and shape, of the state dict."""

    def __init__(self, path: Path, header: GGUFHeader, config: PretrainedConfig) -> None:
        self.path = path
        self._layout = Layout(config)
        self._place: dict[str, GGUFTensor] = {}
        self.entries: dict[str, TensorInfo] = {}
        left = dict(header.tensors)
        for name in build(config, path, real_buffers=False).state_dict():
            place = left.pop(self._layout.name(name), None)
            if place is None:
                continue  # tied, or missing: `resolve` knows which
            if place.type.name not in (*PLAIN, *DECODED, *codecs.names()):
                raise CheckpointError(f"{path}: tensor {place.name} is {place.type.name}, which cannot be decoded.",
                                      "Upgrade the gguf package, or give the Hugging Face folder.")  # fmt: skip
            self._place[name] = place
            shape = self._layout.shape(name, place.shape)
            self.entries[name] = TensorInfo(name, shape, place.type.name, place.nbytes)
        for name in left.keys() - set(ROPE_TENSORS):  # kept under GGUF's name, so that it is reported as unexpected
            self.entries[name] = TensorInfo(name, left[name].shape, left[name].type.name, left[name].nbytes)

    def file(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> Tensor:
        """The tensor as the state dict has it: float tensors in their dtype, block formats as float32."""
        value = read_tensor(self.path, self._place[name])
        rows = self._layout.rows(name, value.shape[0])
        if rows is not None:
            value = torch.empty_like(value).index_copy_(0, rows, value)
        if shift := self._layout.shift(name):
            value = value.float() - shift
        return value.T.contiguous() if self._layout.transposed(name) else value


def read_tensor(path: Path, place: GGUFTensor) -> Tensor:
    """A tensor as the file has it, in memory of its own; block formats decoded to float32."""
    if place.type.name in PLAIN:
        value = torch.empty(place.shape, dtype=PLAIN[place.type.name])
        read_into(path, place.offset, value)
        return value
    rows, columns = int(np.prod(place.shape[:-1])), place.shape[-1]
    stride = place.nbytes // rows
    step = max(1, CHUNK // columns)
    value = torch.empty(rows, columns)
    raw = torch.empty(step * stride, dtype=torch.uint8)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        read_into(path, place.offset + start * stride, raw[: count * stride])
        value[start : start + count] = _decoded(raw[: count * stride].view(count, stride), place.type.name, columns)
    return value.view(place.shape)


def _decoded(blocks: Tensor, kind: str, columns: int) -> Tensor:
    """Rows of blocks as float32; a damaged scale becomes NaN or Inf, which Checkpoint.read reports by name."""
    if kind in DECODED:
        with np.errstate(all="ignore"):
            return torch.from_numpy(dequantize(blocks.numpy(), DECODED[kind]))
    return Coded(codecs.get(kind), {"blocks": blocks}, (len(blocks), columns)).decode()


def open_gguf(path: Path, source: str) -> Checkpoint:
    """Open a GGUF file. Raises CheckpointError naming the file and the cause."""
    header = read_header(path)

    def small(name: str) -> Tensor:
        place = header.tensors[name]
        if place.nbytes > 1 << 20:
            raise CheckpointError(f"{path}: tensor {name} has {place.nbytes} bytes.", "Convert the model again.")
        return read_tensor(path, place)

    config = read_config(path, header, small)
    try:
        store = GGUFStore(path, header, config)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: its tensors cannot be named ({short_reason(error)}).",
                              "Upgrade the gguf package, or give the Hugging Face folder.") from error  # fmt: skip
    return Checkpoint(
        source=source, path=path, format="gguf", config=config, config_path=path, store=store, files=[path],
        load_tokenizer=lambda: build_tokenizer(path, header.metadata))  # fmt: skip
