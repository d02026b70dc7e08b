"""A tuned prompt: what it computes is vectors before the embedded input, and the folder alone shows it to any reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from supremum.errors import SupremumError
from supremum.text.windows import frame
from supremum.train.base import load as load_base
from supremum.train.prompt import add_prompt
from supremum.train.tasks import make
from supremum.train.tune import tune
from supremum.train.ways import Way, counts, merged, prepare
from tests.train.test_tune import recipe


@pytest.mark.parametrize("family", ["bert", "qwen2", "llama"])  # qwen2's tables are tied
def test_a_prompt_token_is_a_vector_before_the_input(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    task = make("classify" if family == "bert" else "instruct", {}, "r.yaml")
    task.labels = ["a", "b"]
    model, tokenizer, _ = load_base(str(tiny_model(family)), task, 0)
    plain, before = model.get_input_embeddings().weight.clone(), tokenizer("the river")["input_ids"]
    tokenizer, ids = add_prompt(model, tokenizer, 5, 0)
    assert tokenizer("the river")["input_ids"] == ids + before
    assert len(tokenizer("the river " * 90, truncation=True, max_length=40)["input_ids"]) == 40
    assert tokenizer("a", "b")["input_ids"][:5] == ids and len(tokenizer("a", "b")["input_ids"]) == 7
    model, _ = prepare(model.eval(), Way("prompt", tokens=5), 10, ids)
    head = 0 if family != "bert" else 2 * 64 + 2 + 64 * 64 + 64  # classifier and pooler
    assert counts(model)[0] == head + 5 * 64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        said = model(input_ids=torch.tensor([ids + before])).logits
        out = merged(model).eval()
        assert torch.allclose(out(input_ids=torch.tensor([ids + before])).logits, said, atol=1e-4)
        rows = out.get_input_embeddings().weight
        assert torch.equal(rows[: len(plain)], plain)
        joined = torch.cat([rows[ids], plain[before]])[None]
        assert torch.allclose(out(inputs_embeds=joined).logits, said, atol=1e-4)


def test_the_folder_alone_shows_the_prompt(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from supremum.checkpoint import open_checkpoint

    path = recipe(tmp_path, tiny_model("bert"), way={"name": "prompt", "tokens": 4}, optimiser={"lr": 0.03}, lstm=False)
    done = tune(path, tmp_path, tmp_path / "out")
    assert done.lines[0].metric.value > 0.6 and done.trained < 0.1 * done.parameters
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [line.split("\t") for line in (tmp_path / "test.tsv").read_text().splitlines()]
    right = [model.config.id2label[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] == label
             for text, label in rows]
    assert sum(right) / len(right) == pytest.approx(done.lines[0].metric.value)
    before, after = frame(open_checkpoint(tmp_path / "out").tokenizer())
    assert tokenizer.convert_ids_to_tokens(before) == [f"<|prompt-{n}|>" for n in range(4)] and after == []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": str(tmp_path / "out")}))
    with pytest.raises(SupremumError, match="a tuned prompt already"):
        tune(path, tmp_path, tmp_path / "again")


def test_a_chat_template_begins_with_it(tiny_model: Callable[..., Path]) -> None:
    task = make("instruct", {"length": 64, "new": 8}, "r.yaml")
    model, tokenizer, _ = load_base(str(tiny_model("llama")), task, 0)
    row = {"where": "", "source": "the river", "target": "opens"}
    bare = task.encode([row], tokenizer)[0]
    tokenizer, ids = add_prompt(model, tokenizer, 3, 0)
    assert task.encode([row], tokenizer)[0]["input_ids"] == ids + bare["input_ids"]


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_a_frame_stays_around_the_text_after_loading_again(kind: str, tiny_model: Callable[..., Path],
                                                           tmp_path: Path) -> None:
    """Transformers' BERT class frames anew when it is loaded: the prompt must survive that."""
    import transformers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    inner = Tokenizer(models.WordPiece({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                         special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special,
                                                     model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    if kind == "BertTokenizer":
        tokenizer.save_pretrained(tmp_path / "base")
        tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "base")
    model, *_ = load_base(str(tiny_model("bert")), make("embed", {}, "r.yaml"), 0)
    before = tokenizer("a b", "c d")
    assert before["input_ids"] == [2, 5, 6, 3, 7, 8, 3] and before["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    made, ids = add_prompt(model, tokenizer, 3, 0)
    made.save_pretrained(tmp_path / "out")
    for one in (made, transformers.AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert one("a b")["input_ids"] == [*ids, 2, 5, 6, 3]
        pair = one("a b", "c d")
        assert pair["input_ids"] == ids + before["input_ids"] and pair["token_type_ids"] == [0] * 3 + before["token_type_ids"]
        assert one.convert_ids_to_tokens(ids) == ["<|prompt-0|>", "<|prompt-1|>", "<|prompt-2|>"]
