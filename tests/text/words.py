"""A word-level tokenizer (one word, one token) and the little of a checkpoint that text needs."""

from __future__ import annotations

from types import SimpleNamespace

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

WORDS = 997


def word_tokenizer(frame: str | None = None) -> PreTrainedTokenizerFast:
    """Word "w17" is token 17 + 5; `frame` is a template such as "<s> $A" or "<s> $A </s>"."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(WORDS)), "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", mask_token="<mask>")


def stand_in(tokenizer: PreTrainedTokenizerFast, context: int = 4096) -> SimpleNamespace:
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context)
    return SimpleNamespace(tokenizer=lambda: tokenizer, config=config)

