"""A small recurrent network as a baseline for labels: what no pretraining gives on the same rows.

    embedding (100) -> bidirectional LSTM (2 x 100) -> maximum over time -> linear          a label a text
    embedding (100) -> bidirectional LSTM (2 x 100) -> linear                               a tag a word

Words of the training rows alone. Hochreiter, Schmidhuber 1997; pooling as in Conneau et al. 2017 (arXiv:1705.02364), tags
as in Huang et al. 2015 (arXiv:1508.01991) without its CRF. Adam at 2e-3, dropout 0.5, passes over at most ROWS rows, about
DRAWN in all, small batches for tags, which are rare; the pass that scores best on the valid rows is taken. A word that stands
once is unknown; the words of a text after the first LENGTH are not read, and have the tag O.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ..measure.metrics import entities

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|\w+|[^\w\s]")  # a Han or kana character is a word
PAD, UNKNOWN, IGNORED = 0, 1, -100
VOCABULARY, LENGTH, SCORED = 20_000, 64, 256  # SCORED: rows of a batch that is not trained on
ROWS, DRAWN = 20_000, 42_000  # DRAWN: rows of all passes together; about 100 s on one core, SST-2 six times


class Network(nn.Module):
    def __init__(self, words: int, labels: int, pooled: bool, size: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size, padding_idx=PAD)
        self.lstm = nn.LSTM(size, size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * size, labels)
        self.dropout = nn.Dropout(0.5)
        self.pooled = pooled

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits (B, L) of a text, or (B, T, L) of its words."""
        packed = nn.utils.rnn.pack_padded_sequence(self.dropout(self.embedding(ids_BT)), lengths_B, batch_first=True,
                                                   enforce_sorted=False)
        hidden_BTD, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=-1e9)
        logits: Tensor = self.head(self.dropout(hidden_BTD.amax(1) if self.pooled else hidden_BTD))
        return logits


def predict(train: tuple[Sequence[str], Sequence[str]], valid: tuple[Sequence[str], Sequence[str]], test: Sequence[str],
            seed: int = 0) -> list[str]:
    """Labels of `test` by a network trained on (texts, labels)."""
    def right(said: list[list[str]]) -> float:
        return float(sum(one == [label] for one, label in zip(said, valid[1], strict=True)))

    texts, held, asked = ([_words(text) for text in rows] for rows in (train[0], valid[0], test))
    said = _learn(texts, [[label] for label in train[1]], held, asked, right, seed, pooled=True, batch=64, epochs=6)
    return [label for label, in said]


def tag(train: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
        valid: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]], test: Sequence[Sequence[str]],
        seed: int = 0) -> list[list[str]]:
    """BIO tags of every word of `test` by a network trained on (words, tags)."""
    def whole(said: list[list[str]], rows: Sequence[Sequence[str]]) -> list[list[str]]:
        return [(tags + ["O"] * len(words))[:len(words)] for tags, words in zip(said, rows, strict=True)]

    def f1(said: list[list[str]]) -> float:
        return entities(valid[1], whole(said, valid[0]))["f1"]

    return whole(_learn(train[0], train[1], valid[0], test, f1, seed, pooled=False, batch=16, epochs=12), test)


def _learn(texts: Sequence[Sequence[str]], labels: Sequence[Sequence[str]], held: Sequence[Sequence[str]],
           asked: Sequence[Sequence[str]], score: Callable[[list[list[str]]], float], seed: int, *,
           pooled: bool, batch: int, epochs: int) -> list[list[str]]:
    """What the network says of `asked`: the labels of each text. labels: one of a text, or one of each word. score: of what
    it says of `held`; the best pass is taken."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(texts), generator=generator)[:ROWS].tolist()
    common = Counter(word for place in picked for word in texts[place]).most_common(VOCABULARY)
    index = {word: number for number, (word, count) in enumerate(common, 2) if count > 1}
    names = sorted({label for row in labels for label in row})
    number = {label: place for place, label in enumerate(names)}
    ids = [_ids(texts[place], index) for place in picked]
    wanted = [torch.tensor([number[label] for label in labels[place][:LENGTH]]) for place in picked]
    held_ids, asked_ids = ([_ids(words, index) for words in rows] for rows in (held, asked))
    best = -1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(len(index) + 2, len(names), pooled)
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(max(2, min(epochs, DRAWN // len(ids)))):
            network.train()
            for places in torch.randperm(len(ids), generator=generator).split(batch):
                logits = network(*_batch([ids[place] for place in places.tolist()]))
                target = pad_sequence([wanted[place] for place in places.tolist()], batch_first=True, padding_value=IGNORED)
                loss = cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
            if (found := score(_say(network, held_ids, names))) > best:
                best, kept = found, copy.deepcopy(network.state_dict())
        network.load_state_dict(kept)
        return _say(network, asked_ids, names)


@torch.inference_mode()
def _say(network: Network, ids: Sequence[list[int]], names: Sequence[str]) -> list[list[str]]:
    network.eval()
    said: list[list[str]] = [[]] * len(ids)
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    for start in range(0, len(order), SCORED):
        places = order[start : start + SCORED]
        found = network(*_batch([ids[place] for place in places])).argmax(-1).view(len(places), -1).tolist()
        for place, row in zip(places, found, strict=True):
            said[place] = [names[one] for one in row[: len(ids[place])]]
    return said


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _ids(words: Sequence[str], index: dict[str, int]) -> list[int]:
    return [index.get(word, UNKNOWN) for word in words[:LENGTH]] or [UNKNOWN]


def _batch(ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = [len(one) for one in ids]
    return torch.tensor([one + [PAD] * (max(lengths) - len(one)) for one in ids]), torch.tensor(lengths)
