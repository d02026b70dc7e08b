"""Tokenizers written into GGUF: llama.cpp must cut any text as the `tokenizers` library does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.gguf_vocabulary import add_vocabulary
from supremum.checkpoint.pretokenizers import RULES
from supremum.checkpoint.targets import target
from supremum.errors import CheckpointError
from supremum.runtime import load

TEXTS = [
    "The river carries 12 letters, and 3456 stones wait.",
    "CamelCase HTTPServer isn't they'LL  we're\n\n  indented\r\n\ttabs   ",
    "naïve façade — “quotes” … 3.14159 × 10⁻³ größe ÄÖÜ éÉ",
    "日本語のテキスト と 한국어 и русский, עברית",
    "def f(x):\n    return x**2  # comment!?\n\n\nprint(f(12345678))",
    "emoji 🙂🚀 and\u00a0no-break\u2003spaces //path/to/file",
    "<|im_start|>user\nHello<|im_end|>",
    " leading space", "x", "   ",
]  # fmt: skip


def train(tokenizer: Tokenizer, size: int, special: list[str], alphabet: list[str]) -> None:
    texts = [text for text in TEXTS if "<|" not in text]  # llama.cpp makes a learned "<|im_end|>" a control token
    tokenizer.train_from_iterator(texts * 4, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=alphabet))  # fmt: skip


def model_with(tokenizer: PreTrainedTokenizerFast, tiny_model, folder: Path) -> Path:
    """A tiny llama whose embedding is a little larger than the vocabulary."""
    source = tiny_model("llama", "bfloat16", vocab_size=len(tokenizer) + 5, tie_word_embeddings=True)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def agree(folder: Path, out: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = target("gguf").write(checkpoint, {}, out)
    tokenizer = checkpoint.tokenizer()
    runtime = load("llama_cpp", path, context=256)
    for text in TEXTS:
        assert runtime.tokenize(text) == tokenizer(text).input_ids, text
    runtime.close()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.names[0])
def test_every_splitting_rule(rule, tiny_model, tmp_path):
    backend = Tokenizer(models.BPE(ignore_merges=rule.ignore_merges))
    backend.decoder = decoders.ByteLevel()
    spec = json.loads(backend.to_str()) | {"pre_tokenizer": rule.json}
    backend = Tokenizer.from_str(json.dumps(spec))
    train(backend, 600, ["<|im_start|>", "<|im_end|>"], sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    agree(model_with(tokenizer, tiny_model, tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("prefix", [True, False], ids=["llama 2", "gemma"])
def test_sentencepiece(prefix, tiny_model, tmp_path):
    """Merges from every split of every token, in order of the tokens: what converters make of SentencePiece scores."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    train(trained, 500, [], [])
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [p for p in learned if len(p) > 1] + [p for p in learned if len(p) == 1]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", 1)])  # fmt: skip
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    folder = model_with(tokenizer, tiny_model, tmp_path / "model")
    agree(folder, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [2, 3, 3, 6] and types.count(6) == 256 and types[len(tokenizer):] == [5] * 5
    assert types[tokenizer.convert_tokens_to_ids("\n\n")] == 4
    assert fields["tokenizer.ggml.add_bos_token"].contents() and not fields["tokenizer.ggml.add_eos_token"].contents()
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is prefix


@pytest.mark.parametrize("model", [
    models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), models.WordLevel({"a": 0}, "a"), models.BPE({"a": 0}, []),
])  # fmt: skip
def test_other_tokenizers_are_refused(model):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(CheckpointError, match="no counterpart"):
        add_vocabulary(gguf.GGUFWriter(None, "llama"), tokenizer, 8, "somewhere")


def test_chat_template_and_special_ids(tiny_model, tmp_path):
    folder = tiny_model("llama", "bfloat16")
    fields = gguf.GGUFReader(target("gguf").write(open_checkpoint(folder), {}, tmp_path)).fields
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.padding_token_id"].contents() == tokenizer.pad_token_id
