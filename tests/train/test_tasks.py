"""Tasks: what is encoded is what is decoded; losses against their definition written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from supremum.errors import SupremumError
from supremum.train.tasks import TASKS, make
from supremum.train.tasks.embed import contrastive, pool
from tests.conftest import CHAT_TEMPLATE, tiny_tokenizer


def test_every_task_is_made_and_unknown_settings_are_refused() -> None:
    for name in TASKS:
        assert make(name, {}, "r.yaml").name == name
    with pytest.raises(SupremumError, match="no setting 'stride'"):
        make("classify", {"stride": 8}, "r.yaml")


def test_unknown_and_single_labels_are_refused_by_place() -> None:
    task = make("classify", {}, "r.yaml")
    row = {"where": "a.tsv, line 3", "text": "x"}
    with pytest.raises(SupremumError, match=r"every training row has the label 'a'"):
        task.learn([row | {"label": "a"}] * 2)
    task.learn([row | {"label": "a"}, row | {"label": "b"}])
    with pytest.raises(SupremumError, match=r"a.tsv, line 3: the label 'c' does not occur"):
        task.check([row | {"label": "c"}])


def test_a_words_first_token_carries_its_tag() -> None:
    task, tokenizer = make("tag", {}, "r.yaml"), tiny_tokenizer()
    rows = [{"where": "", "words": ["The", "unseenword", "moves"], "tags": ["O", "B-x", "I-x"]}]
    task.learn(rows)
    assert task.labels == ["B-x", "I-x", "O"]
    (feature,) = task.encode(rows, tokenizer)
    words = tokenizer(rows[0]["words"], is_split_into_words=True).word_ids(0)
    said = [place for place, label in enumerate(feature["labels"]) if label != -100]
    assert [words.index(word) for word in range(3)] == said
    assert [task.labels[feature["labels"][place]] for place in said] == rows[0]["tags"]
    logits_1TC = torch.full((1, len(words), 3), 0.0)
    for place, label in enumerate(feature["labels"]):
        logits_1TC[0, place, label if label != -100 else 0] = 1.0  # what later tokens of a word say does not count
    model = Told(lambda **_: SimpleNamespace(logits=logits_1TC))
    assert task.predict(model, tokenizer, rows, 1) == [rows[0]["tags"]]


class Told:
    """A model that answers what it was told to."""

    device = torch.device("cpu")

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def __call__(self, **inputs: Any) -> Any:
        return self.answer(**inputs)


def test_an_answer_is_found_again_in_whichever_window_holds_it() -> None:
    """Logits that are 1 at the encoded positions decode to the answer itself; other windows point at the first token."""
    task, tokenizer = make("answer", {"length": 48, "stride": 16}, "r.yaml"), tiny_tokenizer()
    context = " ".join(f"the river {n} moves the stone." for n in range(20)) + " A bridge crosses it. " + "the end " * 10
    rows = [{"where": "", "question": "what crosses?", "context": context, "answers": ["A bridge"],
             "start": context.index("A bridge")}]
    task.learn(rows)
    features = task.encode(rows, tokenizer)
    found = [feature for feature in features if feature["start_positions"]]
    assert len(features) > 3 and 1 <= len(found) < len(features)
    assert all(len(feature["input_ids"]) <= 48 for feature in features)
    for feature in found:
        ids = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
        assert tokenizer.decode(ids).strip() == "A bridge"
    told = {tuple(feature["input_ids"]): feature for feature in features}

    def answer(input_ids: torch.Tensor, **_: Any) -> Any:
        start_BT, end_BT = torch.zeros(input_ids.shape), torch.zeros(input_ids.shape)
        for number, ids in enumerate(input_ids.tolist()):
            feature = next(value for key, value in told.items() if tuple(ids[: len(key)]) == key)
            start_BT[number, feature["start_positions"]] = end_BT[number, feature["end_positions"]] = 1.0
        return SimpleNamespace(start_logits=start_BT, end_logits=end_BT)

    assert task.predict(Told(answer), tokenizer, rows, 2) == ["A bridge"]


def test_a_question_without_an_answer_is_left_unanswered_only_where_such_were_trained() -> None:
    task, tokenizer = make("answer", {}, "r.yaml"), tiny_tokenizer()
    rows = [{"where": "", "question": "what?", "context": "the river moves", "answers": [], "start": -1}]

    def first(input_ids: torch.Tensor, **_: Any) -> Any:
        logits_BT = torch.zeros(input_ids.shape)
        logits_BT[:, 0] = 5.0
        return SimpleNamespace(start_logits=logits_BT, end_logits=logits_BT)

    task.learn(rows)
    assert task.encode(rows, tokenizer)[0]["start_positions"] == 0
    assert task.predict(Told(first), tokenizer, rows, 1) == [""] == task.truth(rows)[0]
    task.learn([rows[0] | {"answers": ["river"], "start": 4}])
    assert task.predict(Told(first), tokenizer, rows, 1) != [""]


def test_a_dialogue_s_prompt_is_its_turns_and_the_oldest_go_first() -> None:
    tokenizer = tiny_tokenizer()
    turns = [{"role": role, "content": content} for role, content in (
        ("system", "Be brief."), ("user", "the river"), ("assistant", "the stone"), ("user", "a bridge"),
        ("assistant", "a window"), ("user", "the garden"))]
    row = {"where": "", "source": "the garden", "target": "the winter", "turns": turns}

    def prompt(length: int, template: bool = True) -> str:
        task = make("instruct", {"length": length, "new": 8}, "r.yaml")
        tokenizer.chat_template = CHAT_TEMPLATE if template else None
        ids = task.encode([row], tokenizer)[0]["input_ids"]
        return str(tokenizer.decode(ids))

    whole, short = prompt(512), prompt(90)
    assert whole.count("<|im_start|>") == 7 and whole.index("Be brief.") < whole.index("the river") < whole.index("a window")
    assert "Be brief." in short and "the garden" in short and "a bridge" in short and "the river" not in short
    assert "the stone" not in short  # an answer goes with its question
    assert "user: the river\nassistant: the stone\n" in prompt(512, template=False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SupremumError, match=r"refuses the turns system, user.*roles must alternate"):
        make("instruct", {}, "r.yaml").encode([row], tokenizer)
    assert make("instruct", {}, "r.yaml").text(row).splitlines() == [turn["content"] for turn in turns]


def test_the_loss_of_a_causal_model_is_that_of_the_target_alone(tiny_model: Callable[..., Path]) -> None:
    """Against the definition: log p of each target token given what stands before, from one row without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    task, tokenizer = make("instruct", {"length": 64, "new": 16, "prompt": "Q {source} A"}, "r.yaml"), tiny_tokenizer()
    rows = [{"where": "", "source": "the river", "target": "the stone moves"}, {"where": "", "source": "a", "target": "b c"}]
    features = task.encode(rows, tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        loss = float(task.loss(model, task.collate(tokenizer)(features)))
        for feature, row in zip(features, rows, strict=True):
            ids = feature["input_ids"]
            target = [*tokenizer(row["target"])["input_ids"], tokenizer.eos_token_id]
            assert ids[-len(target):] == target
            log_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for place in range(len(ids) - len(target), len(ids)):
                total, count = total - float(log_TV[place - 1, ids[place]]), count + 1
    assert math.isclose(loss, total / count, rel_tol=1e-5)


def test_a_long_source_is_cut_and_the_prompt_around_it_is_kept() -> None:
    task, tokenizer = make("instruct", {"length": 48, "new": 16, "prompt": "Q {source} A!"}, "r.yaml"), tiny_tokenizer()
    tokenizer.chat_template = None
    (feature,) = task.encode([{"where": "", "source": "the river moves " * 50, "target": "x"}], tokenizer)
    prompt = [token for token, label in zip(feature["input_ids"], feature["labels"], strict=True) if label == -100]
    assert len(prompt) <= 32
    assert tokenizer.decode(prompt).startswith("Q the river") and tokenizer.decode(prompt).endswith("A!")


def test_generation_reads_rows_of_unlike_length_as_if_alone(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    task, tokenizer = make("instruct", {"length": 64, "new": 8}, "r.yaml"), tiny_tokenizer()
    rows = [{"where": "", "source": "the river " * n, "target": "x"} for n in (1, 5, 2)]
    assert task.predict(model, tokenizer, rows, 3) == [task.predict(model, tokenizer, [row], 1)[0] for row in rows]


def test_contrastive_loss_against_its_sum_written_out() -> None:
    torch.manual_seed(0)
    unit_BD = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    label = [0, 1, 0, 2, 1, 0]
    tau, losses = 0.2, []
    for i in range(6):
        same = [j for j in range(6) if j != i and label[j] == label[i]]
        below = sum(math.exp(float(unit_BD[i] @ unit_BD[j]) / tau) for j in range(6) if j != i)
        if same:
            losses.append(-sum(math.log(math.exp(float(unit_BD[i] @ unit_BD[j]) / tau) / below) for j in same) / len(same))
    assert math.isclose(float(contrastive(unit_BD, torch.tensor(label), tau)), sum(losses) / len(losses), rel_tol=1e-5)
    assert float(contrastive(unit_BD, torch.arange(6), tau)) == 0.0


def test_padding_does_not_move_an_embedding() -> None:
    hidden_BTD = torch.randn(1, 5, 3)
    mask_BT = torch.tensor([[1, 1, 1, 0, 0]])
    assert torch.allclose(pool(hidden_BTD, mask_BT), pool(hidden_BTD[:, :3], mask_BT[:, :3]))
