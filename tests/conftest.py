"""Shared fixtures: tiny random models of every supported family, as folders that `save_pretrained` wrote."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "phi3")
ENCODERS = ("bert", "distilbert", "roberta", "albert")
FAMILIES = DECODERS + ENCODERS
PAIRS = ("marian", "bart", "pegasus", "t5")  # encoder-decoders
VOCABULARY = 384

_LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
_BERT = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=130, pad_token_id=1,
)  # fmt: skip
_MARIAN = dict(
    vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=130, bos_token_id=0,
    eos_token_id=1, pad_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None, init_std=0.12,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=1, eos_token_id=1,
    decoder_start_token_id=1,
)  # fmt: skip
# family: (config class, its arguments, model class)
_RECIPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": None}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 32, "tie_word_embeddings": True}, "Qwen3ForCausalLM"),
    "gemma3": (
        "Gemma3TextConfig",
        _LLAMA | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
        "Gemma3ForCausalLM",
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 256,
         "bos_token_id": 0, "eos_token_id": 1},
        "GPT2LMHeadModel",
    ),
    "phi3": ("Phi3Config", _LLAMA | {"sliding_window": None}, "Phi3ForCausalLM"),
    "bert": ("BertConfig", _BERT, "BertForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
         "max_position_embeddings": 130, "pad_token_id": 1},
        "DistilBertForMaskedLM",
    ),
    "roberta": ("RobertaConfig", _BERT, "RobertaForMaskedLM"),
    "albert": ("AlbertConfig", _BERT | {"embedding_size": 64}, "AlbertForMaskedLM"),
    "electra": ("ElectraConfig", _BERT | {"embedding_size": 32}, "ElectraForPreTraining"),
    "marian": ("MarianConfig", _MARIAN | {"scale_embedding": True}, "MarianMTModel"),
    "bart": ("BartConfig", _MARIAN, "BartForConditionalGeneration"),
    "t5": ("T5Config", _T5, "T5ForConditionalGeneration"),
    "umt5": ("UMT5Config", _T5, "UMT5ForConditionalGeneration"),
    "pegasus": ("PegasusConfig", _MARIAN | {"encoder_layers": 3}, "PegasusForConditionalGeneration"),
}  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens, trained on a few deterministic sentences."""
    nouns = ["river", "stone", "teacher", "engine", "window", "garden", "letter", "market", "winter", "bridge"]
    verbs = ["moves", "carries", "follows", "opens", "measures", "answers", "repairs", "counts", "crosses", "paints"]
    text = [f"The {a} {v} the {b} at {i * 7 % 24} o'clock, and {b} {i + j} waits for {a}s."
            for i, a in enumerate(nouns) for j, b in enumerate(reversed(nouns)) for v in verbs]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, dtype="float32", architecture=None, shard=None, **config)`: the folder of a random model.

    Seeded, and with no parameter at its trivial value (norms are not 1, biases not 0). `architecture`: another class of
    the family; `shard`: `max_shard_size` of save_pretrained. The folder is shared: copy it before changing it.
    """
    made: dict[str, Path] = {}

    def make(family: str, dtype: str = "float32", architecture: str | None = None, shard: str | None = None,
             **overrides: Any) -> Path:  # fmt: skip
        key = repr((family, dtype, architecture, shard, sorted(overrides.items())))
        if key not in made:
            config_name, arguments, model_name = _RECIPES[family]
            config = getattr(transformers, config_name)(**arguments | {"initializer_range": 0.12} | overrides)
            generator = torch.random.get_rng_state()
            torch.manual_seed(0)
            model = getattr(transformers, architecture or model_name)(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
            torch.random.set_rng_state(generator)
            folder = tmp_path_factory.mktemp(family)
            model._keys_to_ignore_on_save = None  # Marian's table of places, as `tune` writes it
            model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard or "50GB")
            tiny_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
