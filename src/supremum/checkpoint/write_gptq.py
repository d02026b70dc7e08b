"""The target `gptq`: a folder in the layout of GPTQ checkpoints, version 1, which GPTQModel, vLLM and SGLang read.

    config.json                        with quantization_config, see `quantization_config` below
    quantize_config.json               the same settings, where older readers look for them
    model.safetensors                  or shards and an index; codecs/gptq.py says what stands for a linear layer
    tokenizer and generation files     as in the target compressed-tensors

The format has one width and one group size for the whole model. Layers that have others, or stay as they are, are named
by rules of `dynamic` (https://github.com/ModelCloud/GPTQModel, "Dynamic quantization"), which GPTQModel, vLLM and SGLang
follow; stock Transformers (through Optimum) loads folders without such rules only. Symmetric grids only: readers disagree
on asymmetric zero points of version 1 that are 0, and GPTQModel refuses such folders of other makers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from .. import __version__, codecs
from ..codecs.gptq import BLOCK, GPTQ
from ..errors import CheckpointError
from .architecture import objective
from .write_compressed_tensors import FUSED, CompressedTensorsTarget, Prepared, specs_of, to_json
from .write_safetensors import Spec

CODEC = re.compile(r"gptq(\d)-(?:g(\d+)|channel)")
MERGED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "query": "qkv_proj", "q_lin": "qkv_proj"}  # vLLM's names


class GPTQTarget(CompressedTensorsTarget):
    """See `supremum.checkpoint.targets.Target`. Shards, kept tensors and small files are compressed-tensors' own."""

    name = "gptq"
    runtime = "gptqmodel"
    menu: tuple[str, ...] = tuple(f"gptq{bits}-g{group}" for group in (64, 32) for bits in (2, 3, 4, 8))

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        """Symmetric integers whose group divides the row, for the linear layers of a decoder's blocks."""
        prepared = self._prepare(checkpoint)
        found = checkpoint.config.architectures[0]
        if objective(found) != "next" or not prepared.inner or checkpoint.config.is_encoder_decoder:
            other = "archive" if checkpoint.config.is_encoder_decoder else "compressed-tensors"
            raise CheckpointError(f"{found} is not a decoder with nn.Linear in its blocks, which GPTQ readers load.",
                                  f"Use --target {other}.")
        if name not in prepared.inner or shape_OI[0] % BLOCK:
            return []
        return [n for n in codecs.names() if CODEC.fullmatch(n) and codecs.fits(codecs.get(n), shape_OI)]

    def how_to_run(self, architecture: str, codecs: Collection[str], file: str) -> str:
        """GPTQModel and vLLM; Transformers too, if one codec covers all."""
        run = f"""```python
# pip install gptqmodel
from gptqmodel import GPTQModel
model = GPTQModel.load("{file}")
print(model.tokenizer.decode(model.generate("The capital of France is")[0]))
```

vLLM reads the same folder: `vllm serve {file}`"""
        if len(codecs) == 1:
            run += f"""

With `pip install gptqmodel optimum` Transformers loads it too, if no layer was kept as it was:
`AutoModelForCausalLM.from_pretrained("{file}")`"""
        return run

    def stored(self, name: str, codec_name: str, shape: tuple[int, ...]) -> list[Spec]:
        """The stored tensors of a compressed matrix (O, I)."""
        codec = codecs.get(codec_name) if CODEC.fullmatch(codec_name) else None
        if not isinstance(codec, GPTQ):
            raise CheckpointError(f"{name}: {codec_name} is not a codec of GPTQ.")
        return specs_of(name, codec.stored(shape))

    def quantization(self, prepared: Prepared, plan: Mapping[str, str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return quantization_config(sorted(name.removesuffix(".weight") for name in prepared.inner), plan)

    def _small_files(self, checkpoint: Any, plan: Mapping[str, str],
                     shards: dict[str, dict[str, list[Spec]]]) -> dict[str, bytes]:
        files = super()._small_files(checkpoint, plan, shards)
        if plan:
            files["quantize_config.json"] = to_json(self.quantization(self._prepare(checkpoint), plan))
        return files


def quantization_config(linears: list[str], plan: Mapping[str, str]) -> dict[str, Any]:
    """linears: module names of the linear layers of the blocks; plan: weight name -> codec name, not empty.

    The commonest codec is the model's own; each set of fused layers with another, or none, has a rule of its own.
    """
    common = Counter(plan.values()).most_common(1)[0][0]
    rules: dict[str, dict[str, Any]] = {}
    for members in _fused(linears, plan):
        codec = plan.get(f"{members[0]}.weight")
        if codec == common:
            continue
        parent, _, _ = members[0].rpartition(".")
        leaves = [member.rpartition(".")[2] for member in members]
        leaves += [MERGED[leaves[0]]] if len(members) > 1 else []
        pattern = f"^{re.escape(parent)}\\.({'|'.join(map(re.escape, leaves))})$"
        rules[f"-:{pattern}" if codec is None else f"+:{pattern}"] = {} if codec is None else _width(codec)
    return {"quant_method": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32", "sym": True, "desc_act": False,
            "lm_head": False, **_width(common), "meta": {"quantizer": [f"supremum:{__version__}"]}} | (
                {"dynamic": rules} if rules else {})  # fmt: skip


def _fused(modules: list[str], plan: Mapping[str, str]) -> list[list[str]]:
    """The modules, those together that readers fuse into one; apart where their codecs differ."""
    sets: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        first = next((names[0] for names in FUSED if leaf in names), leaf)
        sets.setdefault((parent, first), []).append(module)
    together = []
    for (_, first), members in sets.items():
        members.sort(key=lambda name: name.rpartition(".")[2] != first)  # MERGED knows the first of a set
        same = len({plan.get(f"{name}.weight") for name in members}) == 1
        together += [members] if same else [[name] for name in members]
    return together


def _width(codec: str) -> dict[str, int]:
    """Bits and group size (-1: a whole row) as the format names them."""
    match = CODEC.fullmatch(codec)
    assert match is not None, codec
    return {"bits": int(match[1]), "group_size": int(match[2] or -1)}
