"""Checkpoints: models on disk, opened strictly and read lazily.

checkpoint = open_checkpoint("demo")            # or a folder, a hub id, a .gguf file, a Supremum output folder
weight_OI = checkpoint.read("model.layers.0.mlp.up_proj.weight")
block = checkpoint.skeleton().model.layers[0]   # parameters on the meta device
checkpoint.materialise(block, "model.layers.0.", torch.float32)
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from .architecture import TensorInfo
from .opened import Checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a model: a Hugging Face folder, a hub id, a .gguf file, a Supremum output folder, or "demo".

    `revision`: branch, tag or commit of a hub id. Names, shapes and headers are checked here; weights are read later,
    one at a time. Raises CheckpointError naming the file, the cause and the remedy.
    """
    from .hf import download, open_folder

    text = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return open_folder(path, text)
    if path.exists():
        raise CheckpointError(
            f"{path}: is not a model folder or a .gguf file.", "Give one of these, a hub id, or `demo`."
        )
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) or text.endswith(".gguf"):
        raise CheckpointError(f"{text}: does not exist.", "Give a model folder, a .gguf file, a hub id, or `demo`.")
    return open_folder(download(text, revision), text)
