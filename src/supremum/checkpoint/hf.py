"""Hugging Face folders and hub ids: config.json, one safetensors file or shards with an index, tokenizer files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..errors import CheckpointError
from .architecture import TensorInfo, check_sizes, short_reason
from .opened import Checkpoint, Store
from .plugin import METHOD
from .safetensors_file import DTYPES, SafetensorsFile
from .safety import inside, read_json, refuse_code, refuse_pickles

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE*",
    *TOKENIZER_FILES,
]


class SafetensorsStore:
    """The tensors of one or many safetensors files."""

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self._file: dict[str, SafetensorsFile] = {}
        self.entries: dict[str, TensorInfo] = {}
        for file in files:
            for name, entry in file.entries.items():
                if name in self._file:
                    raise CheckpointError(
                        f"{file.path}: tensor {name} is also in {self._file[name].path.name}.",
                        "Download the model again; a tensor must lie in one shard.",
                    )
                self._file[name] = file
                self.entries[name] = TensorInfo(name, entry.shape, entry.dtype, entry.nbytes)

    def read(self, name: str) -> Tensor:
        return self._file[name].read(name)

    def file(self, name: str) -> Path:
        return self._file[name].path

    def pieces(self, parts: Collection[str]) -> dict[str, dict[str, str]]:
        """Stored names whose last word is one of `parts`: what stands before it -> the word -> the name."""
        found: dict[str, dict[str, str]] = {}
        for name in self.entries:
            base, _, part = name.rpartition(".")
            if part in parts:
                found.setdefault(base, {})[part] = name
        return found


def open_folder(folder: Path, source: str) -> Checkpoint:
    """Open a Hugging Face folder. Raises CheckpointError naming the file and the cause."""
    settings = read_settings(folder)
    files = weight_files(folder)
    plain = SafetensorsStore([SafetensorsFile(path) for path in files])
    config = build_config(folder, settings, len(plain.entries))
    store: Store = plain
    format = "safetensors"
    quantization = settings.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        store, format = _quantised(method, plain, quantization, config, folder / "config.json"), str(method)
    refuse_integers(store.entries, store)
    return Checkpoint(
        source=source,
        path=folder,
        format=format,
        config=config,
        config_path=folder / "config.json",
        store=store,
        files=[folder / "config.json", *files, *tokenizer_files(folder)],
        load_tokenizer=lambda: load_tokenizer(folder),
    )


def _quantised(method: object, plain: SafetensorsStore, settings: dict[str, Any], config: PretrainedConfig,
               path: Path) -> Store:
    """The logical weights of a folder whose config names a quantisation."""
    if method == "compressed-tensors":
        from .compressed import CompressedStore

        return CompressedStore(plain, settings, path)
    if method == "gptq":
        from .gptq import GPTQStore

        return GPTQStore(plain, settings, config, path)
    if method == "supremum-int8":
        from .int8 import Int8Store

        return Int8Store(plain, settings, path)
    if method == METHOD:
        from .archive import ArchiveStore

        return ArchiveStore(plain, settings, path)
    raise CheckpointError(f"{path}: the weights are quantised already ({str(method)[:40]}).", "Use the original model.")


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it is, checked to ask for no code."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder}: is a PEFT adapter, not a model.",
                "Merge it into its base model (merge_and_unload) and give the merged folder.",
            )
        refuse_pickles(folder, [p.name for p in folder.iterdir()])
        raise CheckpointError(f"{folder}: has no config.json.", "Give a Hugging Face model folder or a .gguf file.")
    path = inside(folder, "config.json")
    settings = read_json(path)
    refuse_code(path, settings)
    return settings


def build_config(folder: Path, settings: dict[str, Any], tensors: int) -> PretrainedConfig:
    """config.json as Transformers understands it, without remote code. `tensors`: how many the weights hold."""
    path = folder / "config.json"
    check_sizes(settings, path, tensors)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # ValueError, KeyError, TypeError, validation errors: all are the file's fault
        raise CheckpointError(
            f"{path}: Transformers does not understand it ({short_reason(error)}).",
            "Upgrade transformers, or repair the file.",
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, after the index has been checked against what each of them holds."""
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single and index:
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}.", "Delete the one that is out of date.")
    if single:
        return [inside(folder, SINGLE)]
    if not index:
        names = [p.name for p in folder.iterdir()]
        refuse_pickles(folder, names)
        raise CheckpointError(
            f"{folder}: has neither {SINGLE} nor {INDEX}.", "Weights are read from safetensors only; get them in that form."
        )
    path = inside(folder, INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensor names to file names.", "Download it again.")
    shards = {name: inside(folder, name) for name in sorted(set(weight_map.values()))}
    for name, shard in shards.items():
        held = SafetensorsFile(shard).entries.keys()
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in sorted(listed - held):
            raise CheckpointError(f"{path}: says that {name} holds {tensor}; it does not.", "Download it again.")
        for tensor in sorted(held - listed):
            other = weight_map.get(tensor)
            where = f"lists it in {other}" if other else "does not list it"
            raise CheckpointError(f"{shard}: holds {tensor}; {path.name} {where}.", "Download the model again.")
    return list(shards.values())


def refuse_integers(entries: Mapping[str, TensorInfo], store: Store) -> None:
    """Weights of an integer type mean a quantised model whose scheme the config does not name."""
    for name, info in entries.items():
        if info.kind in DTYPES and name.endswith(("weight", "bias")) and not DTYPES[info.kind].is_floating_point:
            raise CheckpointError(
                f"{store.file(name)}: {name} is {info.kind}, and config.json names no quantisation.",
                "Use the original model.",
            )


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files that exist, each checked to be a plain file of this folder."""
    found = [
        inside(folder, name) for name in TOKENIZER_FILES if (folder / name).exists() or (folder / name).is_symlink()
    ]
    for path in found:
        if path.name == "tokenizer_config.json":
            refuse_code(path, read_json(path))
    return found


def load_tokenizer(folder: Path) -> Any:
    """Transformers' tokenizer of the folder, from local files and without remote code."""
    if not tokenizer_files(folder):
        raise CheckpointError(f"{folder}: has no tokenizer.", "Copy tokenizer.json and tokenizer_config.json into it.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded ({short_reason(error)}).", "Download the tokenizer files again."
        ) from error


def download(source: str, revision: str | None) -> Path:
    """The local folder of a hub model: from the cache when HF_HUB_OFFLINE is set, else up to date with the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except Exception as error:  # repository, revision, gate, network and cache errors have no common base
        raise CheckpointError(
            f"{source}: there is no such folder here, and as the hub's model of this name it cannot be had "
            f"({short_reason(error)}).",
            "Check the spelling; for the hub the network, HF_HUB_OFFLINE and, where a model is gated, `hf auth login`.",
        ) from error
