"""A small recurrent network as a baseline for labels: what no pretraining gives on the same rows.

    embedding (100) -> bidirectional LSTM (2 x 100) -> maximum over time -> linear          words of the training rows alone

Hochreiter, Schmidhuber 1997; pooling as in Conneau et al. 2017 (arXiv:1705.02364). Adam at 2e-3, dropout 0.5, at most EPOCHS
passes over at most ROWS rows, about DRAWN rows in all; the pass that scores best on the valid rows is taken. A word that
stands once is unknown.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|\w+|[^\w\s]")  # a Han or kana character is a word
PAD, UNKNOWN = 0, 1
VOCABULARY, LENGTH, BATCH = 20_000, 64, 64
ROWS, EPOCHS, DRAWN = 20_000, 6, 42_000  # DRAWN: rows of all passes together; about 100 s on one core, SST-2 six times


class Network(nn.Module):
    def __init__(self, words: int, labels: int, size: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size, padding_idx=PAD)
        self.lstm = nn.LSTM(size, size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * size, labels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.dropout(self.embedding(ids_BT)), lengths_B, batch_first=True,
                                                   enforce_sorted=False)
        hidden_BTD, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=-1e9)
        logits: Tensor = self.head(self.dropout(hidden_BTD.amax(1)))
        return logits


def predict(train: tuple[Sequence[str], Sequence[str]], valid: tuple[Sequence[str], Sequence[str]], test: Sequence[str],
            seed: int = 0) -> list[str]:
    """Labels of `test` by a network trained on (texts, labels)."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(train[0]), generator=generator)[:ROWS].tolist()
    texts = [_words(train[0][place]) for place in picked]
    common = Counter(word for words in texts for word in words).most_common(VOCABULARY)
    index = {word: number for number, (word, count) in enumerate(common, 2) if count > 1}
    labels = sorted(set(train[1]))
    number = {label: place for place, label in enumerate(labels)}
    ids, wanted = [_ids(words, index) for words in texts], torch.tensor([number[train[1][place]] for place in picked])
    held, asked = ([_ids(_words(text), index) for text in part] for part in (valid[0], test))
    best = -1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(len(index) + 2, len(labels))
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(max(2, min(EPOCHS, DRAWN // len(ids)))):
            network.train()
            for places in torch.randperm(len(ids), generator=generator).split(BATCH):
                loss = cross_entropy(network(*_batch([ids[place] for place in places.tolist()])), wanted[places])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
            right = sum(labels[one] == label for one, label in zip(_say(network, held), valid[1], strict=True))
            if right > best:
                best, kept = right, copy.deepcopy(network.state_dict())
        network.load_state_dict(kept)
        said = [labels[one] for one in _say(network, asked)]
    return said


@torch.inference_mode()
def _say(network: Network, ids: Sequence[list[int]]) -> list[int]:
    network.eval()
    said = [0] * len(ids)
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    for start in range(0, len(order), 4 * BATCH):
        places = order[start : start + 4 * BATCH]
        for place, one in zip(places, network(*_batch([ids[place] for place in places])).argmax(-1).tolist(), strict=True):
            said[place] = one
    return said


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _ids(words: Sequence[str], index: dict[str, int]) -> list[int]:
    return [index.get(word, UNKNOWN) for word in words[:LENGTH]] or [UNKNOWN]


def _batch(ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = [len(one) for one in ids]
    return torch.tensor([one + [PAD] * (max(lengths) - len(one)) for one in ids]), torch.tensor(lengths)
