"""The target `compressed-tensors`: a folder that stock Transformers loads, in the layout that vLLM reads.

    config.json                        with quantization_config: one group of layers a codec, their names, what is left
    model.safetensors                  or shards of at most 5 GB and model.safetensors.index.json
    tokenizer and generation files     copied from a folder, made from a GGUF

Format (https://github.com/vllm-project/compressed-tensors): weights of linear layers inside the blocks become what their
codec stores (codecs/layout.py: its tensors and its scheme); embeddings, heads and norms stay floats. vLLM fuses q/k/v and
gate/up, so those share a codec (`ties`). Transformers decodes to floats on the first call, whatever the codec.

Some of its limits (Transformers 5.23, compressed-tensors 0.20) show in config.json. Zero points are read only by its loader
that decodes at once (`dequantize`), and that takes one scheme for all layers: such a codec cannot share a file with another.
Microscaling formats and NVFP4 are decoded to bfloat16, so the model must be bfloat16 too, whatever the original was. A third:
`generate` of an encoder-decoder calls the encoder before the whole model, whose first call would decode, and what decodes
leaves wrappers that make a plain dictionary of the encoder's output. So there it is decoded, and they are taken off, by hand
(`how_to_run`).

Tensors that stay keep their stored precision. From a checkpoint whose tensors were quantised otherwise (GGUF blocks),
they are stored in the config's 16-bit type, float16 if it names none.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .. import codecs
from ..codecs import Coded
from ..codecs.layout import Layout
from ..errors import CheckpointError
from ..workspace import write_atomic
from .architecture import auto_class, has_position_bias, objective
from .hf import INDEX, SINGLE, tokenizer_files
from .safetensors_file import DTYPES
from .targets import plan_of
from .write_safetensors import SafetensorsWriter, Spec, measure

VERSION = "0.20.0"  # of the layout, as compressed-tensors names it
SHARD = 5_000_000_000  # bytes
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"),
         ("q_lin", "k_lin", "v_lin"))  # fmt: skip


class Prepared:
    """What does not depend on the plan: the linear layers of the blocks, and the small files."""

    def __init__(self, checkpoint: Any) -> None:
        skeleton = checkpoint.skeleton()
        linears = [name for name, module in skeleton.named_modules() if type(module) is nn.Linear]
        self.linears = linears
        self.t5 = has_position_bias(skeleton)
        self.inner = {f"{name}.weight" for name in linears if re.search(r"\.\d+\.", f".{name}.")}
        self.files: dict[str, bytes] = {}
        if checkpoint.format == "gguf":
            self._from_objects(checkpoint)
        else:
            folder = Path(checkpoint.path)
            paths = [*tokenizer_files(folder), folder / "generation_config.json"]
            self.files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        dtype = getattr(checkpoint.config, "dtype", None)
        self.dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16

    def _from_objects(self, checkpoint: Any) -> None:
        tokenizer = checkpoint.tokenizer()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            self.files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
        generation = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                      pad_token_id=tokenizer.pad_token_id)
        self.files["generation_config.json"] = generation.to_json_string().encode()


class CompressedTensorsTarget:
    """See `supremum.checkpoint.targets.Target`."""

    name = "compressed-tensors"
    runtime = "transformers"
    menu: tuple[str, ...] = (
        "int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64",
        "int2-g32", "int3-g32", "int4-g32", "int5-g32", "int6-g32", "int8-g32", "int4-channel", "int8-channel",
    )  # fmt: skip
    least: tuple[str, ...] = ()
    allocates = True

    def __init__(self) -> None:
        self._prepared: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()

    def _prepare(self, checkpoint: Any) -> Prepared:
        if checkpoint not in self._prepared:
            self._prepared[checkpoint] = Prepared(checkpoint)
        return self._prepared[checkpoint]

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        """Formats whose group divides the row, for the linear layers of the blocks."""
        prepared = self._prepare(checkpoint)
        if not prepared.inner:
            found = checkpoint.config.architectures[0]
            raise CheckpointError(f"{found} has no nn.Linear in its blocks, which is what this target compresses.",
                                  "Use --target gguf.")
        if prepared.t5:
            raise CheckpointError(f"{checkpoint.source}: Transformers reads the weights of T5's layers before they are "
                                  "decoded, and so cannot load compressed ones.", "Use --target archive.")
        if name not in prepared.inner:
            return []
        return [n for n in codecs.names() if layout(n) and codecs.fits(codecs.get(n), shape_OI)]

    def together(self, names: Collection[str]) -> None:
        """See `Target`: zero points share a file with nothing else."""
        alone = sorted(name for name in names if (kind := layout(name)) and kind.alone)
        if alone and len(set(names)) > 1:
            other = next(name for name in sorted(names) if name != alone[0])
            raise CheckpointError(f"{alone[0]} has zero points, which stock Transformers reads only in a file of one format; "
                                  f"{other} cannot be beside it.",
                                  f"Choose --only {alone[0]}, or formats without zero points.")

    def ties(self, checkpoint: Any) -> list[list[str]]:
        """Projections of the same input that runtimes fuse into one matrix."""
        groups: dict[tuple[str, int], list[str]] = {}
        for name in checkpoint.tensors:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            for number, members in enumerate(FUSED):
                if leaf in members and name in self._prepare(checkpoint).inner:
                    groups.setdefault((parent, number), []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def size(self, checkpoint: Any, plan: Mapping[str, str]) -> int:
        """Bytes of all files together."""
        shards = self._shards(checkpoint, plan)
        small = self._small_files(checkpoint, plan, shards)
        return sum(map(len, small.values())) + sum(measure(_flat(shard)) for shard in shards.values())

    def how_to_run(self, architecture: str, codecs: Collection[str], file: str) -> str:
        """Transformers; vLLM too for a decoder whose codecs its kernels run."""
        loader = auto_class(architecture)
        kinds = [layout(codec) for codec in codecs]
        dtype = ', dtype="bfloat16"' if any(kind and kind.bfloat16 for kind in kinds) else ""
        pairs = architecture.endswith(("MTModel", "ForConditionalGeneration"))
        decode = """
from compressed_tensors.offload import remove_dispatch
model.hf_quantizer.compressor.decompress_model(model)
remove_dispatch(model, onload_tensors=True)""" if pairs else ""
        run = f"""```python
# pip install transformers compressed-tensors
from transformers import AutoTokenizer, {loader}
model = {loader}.from_pretrained("{file}"{dtype}){decode}
tokenizer = AutoTokenizer.from_pretrained("{file}")
```"""
        if objective(architecture) == "next" and not pairs and all(kind and kind.vllm for kind in kinds):
            run += f"\n\nvLLM reads the same folder: `vllm serve {file}`"
        return run

    def write(self, checkpoint: Any, coded: Mapping[str, Coded], folder: Path) -> Path:
        """The folder's files, each whole or not there; config.json last. One tensor is in memory at a time.

        Headers name every codec before the first tensor, so a lazy mapping should be a `LazyCoded`.
        """
        plan = plan_of(coded)
        self.together(set(plan.values()))
        shards = self._shards(checkpoint, plan)
        folder.mkdir(parents=True, exist_ok=True)
        for file, modules in shards.items():
            with SafetensorsWriter(folder / file, _flat(modules)) as out:
                for name, specs in modules.items():
                    for spec, value in zip(specs, self._values(checkpoint, coded, name, specs), strict=True):
                        out.put(spec.name, value)
        small = self._small_files(checkpoint, plan, shards)
        for file in sorted(small, key=lambda name: (name == "config.json", name)):
            write_atomic(folder / file, small[file])
        return folder

    def stored(self, name: str, codec_name: str, shape: tuple[int, ...]) -> list[Spec]:
        """The stored tensors of a compressed matrix (O, I)."""
        return _coded(name, codec_name, shape)

    def quantization(self, prepared: Prepared, plan: Mapping[str, str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return quantization_config(prepared.linears, plan)

    def _values(self, checkpoint: Any, coded: Mapping[str, Coded], name: str, specs: list[Spec]) -> list[Tensor]:
        if name in coded:
            value = coded[name]
            return [value.tensors[spec.name.rpartition(".")[2]] for spec in specs]
        return [checkpoint.read(name).to(specs[0].dtype)]

    def _shards(self, checkpoint: Any, plan: Mapping[str, str]) -> dict[str, dict[str, list[Spec]]]:
        """File name -> state-dict key -> stored tensors; a module's tensors lie in one file."""
        prepared = self._prepare(checkpoint)
        wrong = sorted(plan.keys() - prepared.inner)
        if wrong:
            raise CheckpointError(f"{wrong[0]} is not a linear layer of the blocks; this target cannot compress it.")
        shards: list[dict[str, list[Spec]]] = [{}]
        filled = 0
        for name, info in checkpoint.tensors.items():
            specs = self.stored(name, plan[name], tuple(info.shape)) if name in plan else [kept(prepared, name, info)]
            size = sum(spec.nbytes for spec in specs)
            if filled and filled + size > SHARD:
                shards.append({})
                filled = 0
            shards[-1][name] = specs
            filled += size
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}

    def _small_files(self, checkpoint: Any, plan: Mapping[str, str],
                     shards: dict[str, dict[str, list[Spec]]]) -> dict[str, bytes]:
        prepared = self._prepare(checkpoint)
        config = config_of(checkpoint, prepared)
        if plan:
            config["quantization_config"] = self.quantization(prepared, plan)
            if any(kind and kind.bfloat16 for kind in map(layout, plan.values())):
                config["dtype"] = "bfloat16"
        files = {"config.json": to_json(config), **prepared.files}
        if len(shards) > 1:
            specs = {file: _flat(shard) for file, shard in shards.items()}
            total = sum(spec.nbytes for shard in specs.values() for spec in shard)
            weight_map = {spec.name: file for file, shard in specs.items() for spec in shard}
            files[INDEX] = to_json({"metadata": {"total_size": total}, "weight_map": weight_map})
        return files


def config_of(checkpoint: Any, prepared: Prepared) -> dict[str, Any]:
    """config.json as a dictionary, without quantisation."""
    config: dict[str, Any] = checkpoint.config.to_diff_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = list(checkpoint.config.architectures)
    config["dtype"] = str(prepared.dtype if checkpoint.format == "gguf" else checkpoint.config.dtype
                          or torch.float32).removeprefix("torch.")
    return config


def quantization_config(linears: list[str], plan: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    `linears`: module names of all linear layers; `plan`: weight name -> codec name. When one codec covers all but some
    layers, the group targets "Linear" and the rest are ignored, as published models do; else layers are named.
    """
    groups: dict[str, list[str]] = {}
    for module in linears:
        if f"{module}.weight" in plan:
            groups.setdefault(plan[f"{module}.weight"], []).append(module)
    config_groups, formats, alone = {}, set(), False
    for number, (codec, modules) in enumerate(sorted(groups.items())):
        kind = layout(codec)
        assert kind is not None, codec
        config_groups[f"group_{number}"] = {"targets": ["Linear"] if len(groups) == 1 else modules, **kind.scheme()}
        formats.add(kind.format)
        alone = alone or kind.alone
    settings = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": config_groups,
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "ignore": [m for m in linears if f"{m}.weight" not in plan], "version": VERSION}  # fmt: skip
    return settings | ({"dequantize": True} if alone else {})


def layout(codec: str) -> Layout | None:
    """The codec called so, if it is one of this target."""
    found = codecs.get(codec) if codec in codecs.names() else None
    return found if isinstance(found, Layout) else None


def _coded(name: str, codec: str, shape: tuple[int, ...]) -> list[Spec]:
    """The stored tensors of a compressed matrix (O, I)."""
    kind = layout(codec)
    if kind is None:
        raise CheckpointError(f"{name}: {codec} is not a codec of compressed-tensors.")
    return specs_of(name, kind.stored(shape))


def specs_of(name: str, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[Spec]:
    """What a codec stores, under the module's name."""
    module = name.removesuffix(".weight")
    return [Spec(f"{module}.{part}", dtype, shape) for part, (dtype, shape) in stored.items()]


def kept(prepared: Prepared, name: str, info: Any) -> Spec:
    """How a tensor that is not compressed is stored."""
    return Spec(name, DTYPES.get(info.kind, prepared.dtype), tuple(info.shape))


def _flat(modules: dict[str, list[Spec]]) -> list[Spec]:
    return [spec for specs in modules.values() for spec in specs]


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
