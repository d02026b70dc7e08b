"""Where a Transformers tensor lies in a GGUF file, and how llama.cpp wants its rows.

Names follow the table of the `gguf` library. Four things differ from the state dict:

    llama (Llama, Mistral)   rotary pairs are neighbours (2i, 2i+1) instead of halves (i, i + D/2): the rows of q and k,
                             weights and biases, are permuted head by head
    gemma3                   norm weights are stored as 1 + w
    gpt2                     Conv1D weights (I, O) become (O, I)
    all                      a tied head is left out: llama.cpp falls back to the embedding

A row of a block format is self-contained, so packed rows are permuted like float rows.
"""

from __future__ import annotations

from typing import Any

import gguf
import torch
from torch import Tensor

from ..errors import CheckpointError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "GPT2LMHeadModel": "gpt2",
    "Phi3ForCausalLM": "phi3",
}
CONV1D = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")


def architecture(config: Any) -> str:
    """llama.cpp's name for the model's architecture. Raises CheckpointError, listing what can be written."""
    found = (getattr(config, "architectures", None) or ["?"])[0]
    pairs = getattr(config, "is_encoder_decoder", False)
    if found not in ARCHITECTURES:
        raise CheckpointError(
            f"{found} cannot be written as GGUF.",
            f"This target holds {', '.join(ARCHITECTURES)}; try --target {'archive' if pairs else 'compressed-tensors'}.",
        )
    return ARCHITECTURES[found]


class Layout:
    """Names and row order of one model."""

    def __init__(self, config: Any) -> None:
        """`config`: a PretrainedConfig with `architectures`. Raises CheckpointError if GGUF has none such."""
        self.arch = architecture(config)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        identifier = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        self._names = gguf.get_tensor_name_map(identifier, config.num_hidden_layers)

    def name(self, tensor: str) -> str:
        """GGUF name of a state-dict key. Raises CheckpointError if the architecture has no place for it."""
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None or (self.arch in ("qwen3", "gemma3", "phi3") and found.endswith(".bias")):
            raise CheckpointError(
                f"{tensor}: llama.cpp's {self.arch} architecture has no such tensor.",
                "Use --target compressed-tensors.",
            )
        return found

    def transposed(self, tensor: str) -> bool:
        """Whether the state dict holds (I, O)."""
        return self.arch == "gpt2" and tensor.endswith(CONV1D)

    def shift(self, tensor: str) -> float:
        """What is added to the values."""
        return 1.0 if self.arch == "gemma3" and tensor.endswith("norm.weight") else 0.0

    def rows(self, tensor: str, count: int) -> Tensor | None:
        """Indices that put `count` rows of the state dict into GGUF order; None if they stay."""
        if self.arch != "llama":
            return None
        if tensor.endswith((".q_proj.weight", ".q_proj.bias")):
            heads = self.heads
        elif tensor.endswith((".k_proj.weight", ".k_proj.bias")):
            heads = self.kv_heads
        else:
            return None
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def shape(self, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file, (O, I) for matrices."""
        return shape[::-1] if self.transposed(tensor) else shape

    def arrange(self, tensor: str, value: Tensor) -> Tensor:
        """State-dict values -> values as the file holds them, rows in order."""
        if self.transposed(tensor):
            value = value.T
        if self.shift(tensor):
            value = value.float() + self.shift(tensor)
        rows = self.rows(tensor, value.shape[0])
        return value if rows is None else value[rows]
