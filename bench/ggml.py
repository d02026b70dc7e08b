"""llama.cpp's own quantiser: the kernels that llama-quantize calls, with an importance matrix, out of the xllamacpp wheel.

llama-imatrix gathers E[x^2] of each layer's inputs over the calibration tokens, which is the diagonal of S that the forward
sweep gathers. llama-quantize then hands each matrix and its diagonal to ggml_quantize_chunk. Rows that no block of 256 fits
it quantises as IQ4_NL where a smaller type was asked for, as done here. Its rules for more bits in some layers are left out:
every matrix of the blocks has the one type.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import xllamacpp
from torch import Tensor

from supremum import codecs
from supremum.checkpoint import Checkpoint
from supremum.checkpoint.gguf_types import KINDS
from supremum.checkpoint.targets import LazyCoded, target
from supremum.codecs import Coded
from supremum.gather import gather
from supremum.stats.sweep import moments
from supremum.workspace import Workspace

FALLBACK = "IQ4_NL"
_library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
_chunk = _library.ggml_quantize_chunk
_chunk.restype = ctypes.c_size_t
_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]


def quantized(weight_OI: Tensor, kind: str, importance_I: Tensor | None) -> Coded:
    """The matrix as ggml stores it; importance: E[x^2] of its inputs."""
    codec, (rows, columns) = codecs.get(kind), weight_OI.shape
    weight_OI = weight_OI.float().contiguous()
    importance_I = None if importance_I is None else importance_I.float().contiguous()
    blocks = torch.zeros(codec.nbytes((rows, columns)), dtype=torch.uint8)
    written = _chunk(KINDS[kind].number, weight_OI.data_ptr(), blocks.data_ptr(), 0, rows, columns,
                     None if importance_I is None else importance_I.data_ptr())
    assert written == blocks.numel(), (kind, written, blocks.numel())
    return Coded(codec, {"blocks": blocks.view(rows, -1)}, (rows, columns))


def write(checkpoint: Checkpoint, kind: str, text: str, tokens: int, seed: int, folder: Path) -> Path:
    """A GGUF of which every matrix of the blocks is of this type, or the fallback's; the rest stays as it is."""
    workspace = Workspace(folder / "work", {})
    gathered = gather(checkpoint, workspace, text=[text], tokens=tokens, seed=seed, dtype="float32")
    importance: dict[str, Tensor] = {}
    for block in gathered.stream.blocks:
        sums, keys = moments(workspace, gathered.calls, block)
        importance |= {gathered.inner(block, layer): sums[key].diagonal() for layer, key in keys.items()}
    plan = {name: kind if codecs.fits(codecs.get(kind), gathered.shapes[name]) else FALLBACK for name in importance}
    coded = LazyCoded(plan, lambda name: quantized(gathered.weight(name), plan[name], importance[name]))
    (folder / "out").mkdir(parents=True)
    return target("gguf").write(checkpoint, coded, folder / "out")
