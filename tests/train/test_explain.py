"""Explanations of tasks: shares against a loop that replaces one part after another, the answers against stock Transformers.

The loop puts the mean of the table into what the model's own embedding gives, by a hook: no `inputs_embeds`, no Captum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from supremum.errors import SupremumError
from supremum.measure.explain import LOOKED, Explained, Question, explain, log_probabilities, total
from supremum.train.tasks import Task, make
from supremum.train.tasks.base import doubt
from tests.conftest import tiny_tokenizer

TinyModel = Callable[..., Path]
NAMES = ["B-x", "I-x", "O"]


def opened(folder: Path, noise: float = 0.0) -> Any:
    """The model of a folder in its own class, with noise in its weights."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return model


@torch.no_grad()
def by_hand(model: Any, log_p: Callable[[], Tensor], parts: Sequence[int]) -> list[float]:
    """log p less log p with the tokens of a part replaced, part by part."""
    table = model.get_encoder().embed_tokens if model.config.is_encoder_decoder else model.get_input_embeddings()
    mean_D = table(torch.arange(table.weight.shape[0])).mean(0)
    found, whole = [], float(log_p())
    for part in range(max(parts) + 1):
        calls = []

        def put(module: Any, given: Any, out_1TD: Tensor, part: int = part, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if len(calls) > 1:  # the decoder's, where it shares the table
                return out_1TD
            changed = out_1TD.clone()
            changed[0, [place for place, one in enumerate(parts) if one == part]] = mean_D
            return changed

        handle = table.register_forward_hook(put)
        found.append(whole - float(log_p()))
        handle.remove()
        assert calls
    return found


@torch.no_grad()
def agree(question: Question, models: Sequence[Any], log_p: Callable[[Any], Tensor]) -> Explained:
    """What is explained, the model before its original, is what the loop finds for both."""
    (one,) = explain([question], *models)
    for side, model in zip((one.model, one.reference), models, strict=True):
        assert side is not None and side.log_p == pytest.approx(float(log_p(model)), abs=1e-4)
        wanted = by_hand(model, lambda model=model: log_p(model), question.parts)  # type: ignore[misc]
        assert side.shares == pytest.approx(wanted, abs=2e-4) and max(map(abs, wanted)) > 0.01
        assert len(side.shares) == len(one.tokens)
    assert one.reference is not None
    assert one.likeness == pytest.approx(float(torch.cosine_similarity(*(
        torch.tensor(side.shares) for side in (one.model, one.reference)), dim=0)), abs=1e-5)
    return one


def test_the_tag_that_changed_most_is_explained_at_its_words_first_token(tiny_model: TinyModel) -> None:
    folder = tiny_model("bert", architecture="BertForTokenClassification", num_labels=3)
    model, original, task, tokenizer = opened(folder, 0.5), opened(folder), make("tag", {}, "r.yaml"), tiny_tokenizer()
    task.labels = NAMES
    row = {"where": "", "words": ["The", "unseenword", "moves", "a", "stone"], "tags": ["O", "B-x", "O", "I-x", "B-x"]}
    inputs = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
    first = [inputs.word_ids(0).index(word) for word in range(5)]
    with torch.no_grad():
        was_W3, now_W3 = (one(**inputs).logits[0, first].softmax(-1) for one in (original, model))
    said = was_W3.argmax(-1)
    word = int((now_W3 - was_W3).gather(1, said[:, None]).abs().argmax())
    asked = task.question(row, tokenizer, original, model)
    assert asked is not None and asked.true == row["tags"][word]
    assert asked.target == f"{NAMES[int(said[word])]} of {row['words'][word]}"
    one = agree(asked, [model, original],
                lambda one: one(**inputs).logits[0, first[word]].log_softmax(-1)[said[word]])
    assert one.reference is not None and one.reference.top == NAMES[int(said[word])] and one.reference.attention
    assert one.model.top == NAMES[int(now_W3[word].argmax())]
    kl = (was_W3[word] * (was_W3[word] / now_W3[word]).log()).sum()
    assert one.kl == pytest.approx(float(kl), rel=1e-3) and one.kl > 1e-3

    alone = task.question(row, tokenizer, original)
    wrong = [place for place in range(5) if NAMES[int(said[place])] != row["tags"][place]]
    assert wrong and alone is not None
    worst = max(wrong, key=lambda place: float(was_W3[place].max()))
    assert alone.target.endswith(f" of {row['words'][worst]}") and alone.true == row["tags"][worst]
    right = row | {"tags": [NAMES[int(index)] for index in said]}
    unsure = task.question(right, tokenizer, original)
    assert unsure is not None and unsure.target.endswith(f" of {row['words'][int(was_W3.max(-1).values.argmin())]}")
    assert task.question({"where": "", "words": [""], "tags": ["O"]}, tokenizer, original) is None  # no token at all


@pytest.mark.parametrize("length", [130, 60])
def test_a_span_is_explained_in_the_window_of_the_answer(length: int, tiny_model: TinyModel) -> None:
    folder = tiny_model("bert", architecture="BertForQuestionAnswering")
    model, original, tokenizer = opened(folder, 0.3), opened(folder), tiny_tokenizer()
    task = make("answer", {"length": length, "stride": 16, "words": 4}, "r.yaml")
    context = " ".join(f"the river {n} moves the stone at {n * 7 % 24} o'clock, and a bridge crosses it." for n in range(9))
    row = {"where": "", "question": "what crosses?", "context": context, "answers": ["a bridge"], "start": 40}
    asked = task.question(row, tokenizer, original, model)
    assert asked is not None and asked.true == "a bridge"
    ids = asked.inputs["input_ids"]
    assert [asked.target] == task.predict(original, tokenizer, [row], 2) and asked.target in tokenizer.decode(ids[0])
    assert asked.target.strip() == tokenizer.decode(ids[0, asked.answer[0] : asked.answer[1] + 1]).strip()

    def log_p(one: Any) -> Tensor:
        output = one(input_ids=ids)
        return output.start_logits[0].log_softmax(-1)[asked.answer[0]] + output.end_logits[0].log_softmax(-1)[asked.answer[1]]

    one = agree(asked, [model, original], log_p)
    assert one.reference is not None and one.reference.top == asked.target
    if length <= LOOKED:
        assert list(asked.parts) == list(range(len(ids[0]))) and one.reference.attention
    else:
        assert max(asked.parts) + 1 < len(ids[0]) / 2 and not one.reference.attention
        alone = [asked.parts[place] for place in (0, asked.answer[0], asked.answer[1], asked.answer[0] - 1)]
        assert all(list(asked.parts).count(part) == 1 for part in alone)


def written_by_hand(model: Any, prompt: Tensor, start: Tensor, new: int, encoder: bool) -> list[int]:
    """Greedy, without a cache, no token twice: random models say the same again and again."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < new and 1 not in found:
            before = torch.cat([start if encoder else prompt, torch.tensor([found], dtype=torch.int64)], 1)
            output = model(input_ids=prompt, decoder_input_ids=before) if encoder else model(input_ids=before)
            logits_V = output.logits[0, -1]
            logits_V[before[0]] = float("-inf")
            found.append(int(logits_V.argmax()))
    return found


@pytest.mark.parametrize("family", ["marian", "bart", "t5", "llama", "gemma3"])
def test_what_was_written_is_explained_by_the_source(family: str, tiny_model: TinyModel) -> None:
    encoder = family not in ("llama", "gemma3")
    model, original, tokenizer = opened(tiny_model(family), 0.2), opened(tiny_model(family)), tiny_tokenizer()
    task: Any = make("translate" if encoder else "instruct", {"length": 60, "new": 9}, "r.yaml")
    task.encoder, original.generation_config.no_repeat_ngram_size = encoder, 1
    row = {"where": "", "source": "the teacher opens a window", "target": "a stone"}
    asked = task.question(row, tokenizer, original, model)
    prompt = torch.tensor([task._prompt(row, tokenizer)])
    many, start = prompt.shape[1], torch.tensor([[1]])
    answer = written_by_hand(original, prompt, start, 9, encoder)
    assert list(asked.answer) == answer and len(set(answer)) == len(answer) > 4 and asked.written and asked.true == "a stone"
    assert asked.target == task.predict(original, tokenizer, [row], 1)[0]
    given = torch.tensor([answer[:-1]], dtype=torch.int64)

    def log_p(one: Any) -> Tensor:
        logits_RV = (one(input_ids=prompt, decoder_input_ids=torch.cat([start, given], 1)).logits[0] if encoder else
                     one(input_ids=torch.cat([prompt, given], 1)).logits[0, many - 1 :])
        return torch.stack([logits_RV[at].log_softmax(-1)[index] for at, index in enumerate(answer)]).sum()

    one = agree(asked, [model, original], log_p)
    assert len(one.tokens) == many and one.model.attention and one.reference is not None
    assert all(len(rows) == many == len(rows[0]) for rows in one.model.attention.values())
    assert asked.sure(-4.5) == pytest.approx(-4.5 / len(answer))


HEADS = {"classify": "ForSequenceClassification", "answer": "ForQuestionAnswering", "tag": "ForTokenClassification"}


@pytest.mark.parametrize(("kind", "head"), [("Bart", "classify"), ("Bart", "answer"), ("T5", "classify"), ("T5", "answer"),
                                            ("UMT5", "tag")])
def test_heads_of_encoder_decoders_are_explained_by_what_the_encoder_reads(kind: str, head: str,
                                                                           tiny_model: TinyModel) -> None:
    folder = tiny_model(kind.lower(), architecture=kind + HEADS[head], **({} if head == "answer" else {"num_labels": 3}))
    model, original, tokenizer = opened(folder, 0.3), opened(folder), tiny_tokenizer()
    task = make(head, {"length": 60, **({"stride": 8} if head == "answer" else {})}, "r.yaml")
    task.labels = [] if head == "answer" else NAMES
    end = tokenizer.eos_token  # BART's and T5's heads stand on it
    row = {"classify": {"text": f"the river moves a stone {end}", "label": "O"},
           "answer": {"question": "what moves?", "context": f"the river moves a stone {end}", "answers": ["the river"]},
           "tag": {"words": ["the", "river", "moves"], "tags": ["O", "B-x", "O"]}}[head]
    asked = task.question({"where": "", **row}, tokenizer, original, model)
    assert asked is not None
    at = torch.arange(len(asked.answer)), torch.tensor(asked.answer)

    def log_p(one: Any) -> Tensor:
        return asked.logits(one(**asked.inputs))[0].log_softmax(-1)[at].sum()

    one = agree(asked, [model, original], log_p)
    assert bool(one.model.attention) == (kind != "UMT5")


def test_a_decoders_label_is_read_where_it_is_when_it_answers(tiny_model: TinyModel) -> None:
    """Its head takes the last token that is no padding, which it tells by the token's number; the text ends in padding's."""
    folder = tiny_model("llama", architecture="LlamaForSequenceClassification", num_labels=3)
    model, original, tokenizer = opened(folder, 0.3), opened(folder), tiny_tokenizer()
    model.config.pad_token_id = original.config.pad_token_id = tokenizer.eos_token_id
    task = make("classify", {}, "r.yaml")
    task.labels = NAMES
    row = {"where": "", "text": f"the river moves{tokenizer.eos_token}", "label": "O"}
    asked = task.question(row, tokenizer, original)
    assert asked is not None and asked.inputs["input_ids"][0, -1] == tokenizer.eos_token_id
    agree(asked, [model, original], lambda one: one(**asked.inputs).logits[0].log_softmax(-1)[asked.answer[0]])


def test_the_first_token_of_the_decoder_is_the_one_that_it_writes_after(tiny_model: TinyModel) -> None:
    model, tokenizer = opened(tiny_model("bart")), tiny_tokenizer()
    task: Any = make("translate", {"length": 60, "new": 6}, "r.yaml")
    task.encoder, model.generation_config.decoder_start_token_id, model.generation_config.bos_token_id = True, None, 0
    asked = task.question({"where": "", "source": "the river", "target": "a"}, tokenizer, model)
    assert asked is not None and asked.inputs["decoder_input_ids"][0, 0] == 0
    assert asked.target == task.predict(model, tokenizer, [{"where": "", "source": "the river", "target": "a"}], 1)[0]


def test_of_a_long_text_the_first_tokens_are_explained(tiny_model: TinyModel) -> None:
    model, tokenizer = opened(tiny_model("llama")), tiny_tokenizer()
    task = make("instruct", {"length": 200, "new": 60}, "r.yaml")
    asked = task.question({"where": "", "source": "the river", "target": ""}, tokenizer, model)
    assert asked is not None and len(asked.answer) <= 32
    assert asked.inputs["input_ids"].shape[1] == len(asked.parts) + len(asked.answer) - 1
    whole = task.predict(model, tokenizer, [{"source": "the river"}], 1)[0]
    assert whole.startswith(asked.target[:-1]) and log_probabilities(model, asked).argmax(-1).tolist() == list(asked.answer)
    assert total(asked, log_probabilities(model, asked)) < 0


def test_wrong_answers_ask_for_a_reason_before_unsure_ones() -> None:
    answers = {"sure": (0.9, True), "wrong": (0.6, False), "very wrong": (0.95, False), "unsure": (0.5, True),
               "open": (0.4, None)}
    order = sorted(answers, key=lambda name: doubt(*answers[name]), reverse=True)
    assert order == ["very wrong", "wrong", "open", "unsure", "sure"]


def test_a_task_without_answers_has_no_question() -> None:
    task = make("embed", {}, "r.yaml")
    assert type(task).question is Task.question is not type(make("classify", {}, "r.yaml")).question
    with pytest.raises(SupremumError, match="embed cannot be explained"):
        task.question({}, None, None)
