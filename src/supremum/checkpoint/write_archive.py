"""The target `archive`: the fewest bytes on disk. Layout: archive.py; Transformers loads it after `import supremum`.

    config.json            with quantization_config: {"quant_method": "supremum", "version": 3}
    model.safetensors      coded matrices (other bfloat16 ones without loss), the archive's tables, and what is left
    tokenizer and generation files, as in the target compressed-tensors
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..workspace import write_atomic
from .architecture import auto_class
from .archive import VERSION, Encoder
from .hf import SINGLE
from .plugin import METHOD
from .write_compressed_tensors import Prepared, config_of, kept, to_json
from .write_safetensors import SafetensorsWriter, Spec, measure

LOSSLESS = 0.66  # of a bfloat16 matrix's bytes, about, remain


class ArchiveTarget:
    """What `supremum.checkpoint.targets.Target` promises, but `size`: entropy-coded bytes are counted.

    `coded` maps tensor names to `codecs.lattice.Lattice`; it may be lazy.
    """

    name = "archive"
    runtime = "transformers"
    menu: tuple[str, ...] = ("lattice",)
    least: tuple[str, ...] = ()
    allocates = False

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        """Every matrix can be coded."""
        return ["lattice"]

    def ties(self, checkpoint: Any) -> list[list[str]]:
        return []

    def together(self, names: Collection[str]) -> None:
        """There is one codec only."""

    def how_to_run(self, architecture: str, codecs: Collection[str], file: str) -> str:
        """Transformers, with Supremum's decoder."""
        loader = auto_class(architecture)
        return f"""```python
# pip install supremum
import supremum  # lets Transformers open archives
from transformers import AutoTokenizer, {loader}
model = {loader}.from_pretrained("{file}")
tokenizer = AutoTokenizer.from_pretrained("{file}")
```

For any other runtime: `supremum convert {file} --target compressed-tensors --out converted` (floats), or `--target gguf`
where llama.cpp runs the architecture"""

    def rest(self, checkpoint: Any, stays: Mapping[str, Any]) -> int:
        """About the bytes of the files without the coded matrices. stays: tensor name -> TensorInfo of what is not coded."""
        prepared = Prepared(checkpoint)
        tensors = sum(info.nbytes * LOSSLESS if _without_loss(name, info) else kept(prepared, name, info).nbytes
                      for name, info in stays.items())
        return int(tensors) + _small(checkpoint, prepared)[1]

    def count(self, checkpoint: Any, coded: Mapping[str, Any]) -> dict[str, Any]:
        """Exact bytes of what `write` would make: {"matrices": each, "tables": what they share, "size": all files}."""
        encoder, names = _counted(checkpoint, coded)
        specs = {name: _specs(name, encoder.encode(matrix)) for name, matrix in _matrices(checkpoint, coded, names)}
        tables = [spec for name, tensor in encoder.tables().items() for spec in _specs(name, {"": tensor})]
        prepared = Prepared(checkpoint)
        kept_specs = [kept(prepared, name, info) for name, info in checkpoint.tensors.items() if name not in specs]
        every = [spec for those in specs.values() for spec in those] + tables + kept_specs
        return {"matrices": {name: sum(spec.nbytes for spec in those) for name, those in specs.items()},
                "tables": sum(spec.nbytes for spec in tables), "size": measure(every) + _small(checkpoint, prepared)[1]}

    def write(self, checkpoint: Any, coded: Mapping[str, Any], folder: Path) -> Path:
        """The folder's files, each whole or not there; config.json last. One matrix is in memory at a time."""
        encoder, names = _counted(checkpoint, coded)
        prepared = Prepared(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as streams:  # their lengths come first in the file that they end in
            specs = []
            for name, matrix in _matrices(checkpoint, coded, names):
                parts = encoder.encode(matrix)
                specs += _specs(name, parts)
                streams.writelines(tensor.numpy().tobytes() for tensor in parts.values())
            streams.seek(0)
            tables = encoder.tables()
            rest = {name: kept(prepared, name, info) for name, info in checkpoint.tensors.items() if name not in names}
            shared = [spec for name, tensor in tables.items() for spec in _specs(name, {"": tensor})]
            with SafetensorsWriter(folder / SINGLE, [*specs, *shared, *rest.values()]) as out:
                for spec in specs:
                    out.put(spec.name, torch.frombuffer(bytearray(streams.read(spec.nbytes)), dtype=spec.dtype))
                for name, tensor in tables.items():
                    out.put(name, tensor)
                for name, spec in rest.items():
                    out.put(name, checkpoint.read(name).to(spec.dtype))
        for file, data in _small(checkpoint, prepared)[0].items():
            write_atomic(folder / file, data)
        return folder


def _counted(checkpoint: Any, coded: Mapping[str, Any]) -> tuple[Encoder, list[str]]:
    """An encoder that has seen every matrix, and their names in the checkpoint's order: those that are coded, and the other
    bfloat16 matrices, which are stored without loss."""
    encoder, names = Encoder(), [name for name, info in checkpoint.tensors.items()
                                 if name in coded or _without_loss(name, info)]
    turned = {f"{name}.weight" for name, module in checkpoint.skeleton().named_modules() if isinstance(module, Conv1D)}
    for name, matrix in _matrices(checkpoint, coded, names):
        encoder.count(name, matrix, name in turned and name in coded)
    return encoder, names


def _without_loss(name: str, info: Any) -> bool:
    """Whether a tensor that is not coded is stored as entropy-coded bfloat16."""
    return info.kind == "BF16" and len(info.shape) == 2 and name.endswith(".weight")


def _matrices(checkpoint: Any, coded: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, Any]]:
    """One after the other: what is coded, or the tensor itself."""
    for name in names:
        yield name, coded[name] if name in coded else checkpoint.read(name)


def _specs(name: str, parts: Mapping[str, torch.Tensor]) -> list[Spec]:
    return [Spec(name + suffix, tensor.dtype, tuple(tensor.shape)) for suffix, tensor in parts.items()]


def _small(checkpoint: Any, prepared: Prepared) -> tuple[dict[str, bytes], int]:
    """The small files, config.json last, and their bytes together."""
    config = config_of(checkpoint, prepared) | {"quantization_config": {"quant_method": METHOD, "version": VERSION}}
    files = dict(sorted(prepared.files.items())) | {"config.json": to_json(config)}
    return files, sum(map(len, files.values()))
