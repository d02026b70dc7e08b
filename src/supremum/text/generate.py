"""Calibration text that the model writes itself: ancestral sampling at temperature 1.

Tokens drawn from the model's own distribution p(x) are the very inputs over which KL(p || q) is an expectation; no text
is needed, and nothing is banned. Diversity comes from the starts: a random common token (LLM-QAT, Liu et al. 2023), or
the opening of the chat template's user turn, so that the model writes question and answer (Magpie, Xu et al. 2024).
Where it ends a document or a turn, the next one is opened in the same row.

Random numbers: one uniform number per row and step, inverted through the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.architecture import objective
from ..errors import SupremumError
from ..progress import phase
from .decode import Decoder, cache_bytes
from .windows import check_budget, check_context, check_one_text, frame

BLOCK = 256  # vocabulary entries that are summed together before the cumulative sums
ELEMENTS = 1 << 23  # logits in float32 at one time: 32 MiB
CACHE = 2 << 30  # bytes; a constant, so that the text does not depend on what memory is free
COMMON = 8  # starts are drawn from the first eighth of the vocabulary: byte-pair merges are numbered by frequency


def self_generated(checkpoint: Any, *, tokens: int, length: int, seed: int, batch: int = 96,
                   dtype: torch.dtype | None = None, chat: float = 0.5) -> Tensor:
    """Windows (n, length) int64 written by the model, n = tokens // length, at most `batch` of them at a time
    (fewer where their KV cache would exceed CACHE bytes).

    `chat`: the share of rows that are conversations, where the tokenizer has a chat template. `dtype`: what the model
    computes in (None: bfloat16 where the CPU multiplies in it). The same seed gives the same text on the same machine
    with the same number of threads; elsewhere sums round differently, so callers keep the result.
    Raises SupremumError for models that write no text, and for windows longer than the context.
    """
    check_one_text(checkpoint)
    check_writes(checkpoint)
    count = check_budget(tokens, length)
    check_context(checkpoint, length)
    model = checkpoint.model(dtype or fast_dtype())
    batch = max(1, min(batch, CACHE // (cache_bytes(checkpoint.config, model.dtype) * length)))
    starts = Starts.of(checkpoint.tokenizer(), model, checkpoint.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // batch)
    sizes = [count // rounds + (index < count % rounds) for index in range(rounds)]
    rows, done = [], 0
    with phase("write calibration text", rounds * length) as advance:
        for size in sizes:
            # conversations alternate with documents, so that a part of the rows holds the same mixture
            talks = [int((i + 1) * chat) > int(i * chat) for i in range(done, done + size)]
            rows.append(write(Decoder(model).step, starts, talks, length=length, generator=generator, advance=advance))
            done += size
    return torch.cat(rows)


def check_writes(checkpoint: Any) -> None:
    """Raises SupremumError for a model that writes no text."""
    name = (checkpoint.config.architectures or ["This model"])[0]
    if objective(name) != "next":
        more = " What was compressed from a tuned model is scored by its task: evaluate --reference TUNED." \
            if name.endswith(("Classification", "Answering")) else ""
        raise SupremumError(f"{checkpoint.source}: a {name} does not write text.", f"Give text with --text.{more}")


def write(step: Callable[[Tensor], Tensor], starts: Starts, talks: list[bool], *, length: int,
          generator: torch.Generator, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Rows (B, length) int64; row i is a conversation if talks[i]. `step`: tokens (B,) -> next logits (B, V)."""
    writers = [Writer(starts, talk, generator) for talk in talks]
    token = torch.tensor([writer.given() for writer in writers])
    columns = [token]
    advance()
    for _ in range(length - 1):
        logits = step(token)
        uniform = torch.rand(len(writers), generator=generator, dtype=torch.float64)
        sampled = draw(logits, uniform).tolist()
        token = torch.tensor([writer.next(choice) for writer, choice in zip(writers, sampled, strict=True)])
        columns.append(token)
        advance()
    return torch.stack(columns, 1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample from softmax(logits) by inversion: (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    The cumulative sum runs over sums of BLOCK entries in float64, then within the block that was hit.
    """
    rows = max(1, ELEMENTS // logits.shape[-1])
    return torch.cat([_draw(part.float(), u) for part, u in zip(logits.split(rows), uniform.split(rows), strict=True)])


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    weight = (logits - logits.amax(-1, keepdim=True)).exp_()
    if not bool(torch.isfinite(weight[:, 0]).all()):
        raise SupremumError("The model's answers are not finite.", "Look for broken weights, or compute in float32.")
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).view(len(weight), -1, BLOCK)
    cumulative = weight.sum(-1, dtype=torch.float64).cumsum(-1)
    point = (uniform.to(cumulative.device) * cumulative[:, -1])[:, None]
    block = torch.searchsorted(cumulative, point, right=True).clamp_(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = weight[torch.arange(len(weight)), block[:, 0]]
    steps = inside.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(steps, point - before, right=True)
    last = BLOCK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)  # never an entry of probability zero
    return (block * BLOCK + torch.minimum(index, last))[:, 0].cpu()


@dataclass(frozen=True)
class Starts:
    """How documents and turns begin, and the tokens that end them."""

    document: tuple[int, ...]  # before a document: what the tokenizer puts there
    common: tuple[int, ...]  # first tokens of documents
    ends: frozenset[int]
    opening: tuple[int, ...] = ()  # the chat template up to the user's words; empty without a template
    to_assistant: tuple[int, ...] = ()  # from the user's last word to the assistant's first
    to_user: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, model: Any, vocabulary: int) -> Starts:
        prefix, _ = frame(tokenizer)
        ends = {tokenizer.eos_token_id}
        stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends |= set(stop) if isinstance(stop, (list, tuple)) else {stop}
        opening, to_assistant, to_user = chat_pieces(tokenizer)
        special = set(tokenizer.all_special_ids)
        ends |= {piece[0] for piece in (to_assistant, to_user) if piece and piece[0] in special}
        return cls(tuple(prefix), tuple(common_tokens(tokenizer, vocabulary)), frozenset(ends - {None}),
                   opening, to_assistant, to_user)


def chat_pieces(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Tokens of the chat template around the turns: (opening, user to assistant, assistant to user); empty without one.

    The template is rendered by Transformers in Jinja's sandbox. One that fails or does not show the words is not used.
    """
    if not getattr(tokenizer, "chat_template", None):
        return (), (), ()
    words = ("Qx7marker", "Ay8marker", "Qz9marker")
    roles = ("user", "assistant", "user")
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)], tokenize=False)
    except Exception:  # a template is a program of the model's author; whatever it raises, documents remain
        return (), (), ()
    places = [shown.find(word) for word in words]
    if places != sorted(places) or places[0] < 0:
        return (), (), ()
    pieces, begin = [], 0
    for place, word in zip(places, words, strict=True):
        pieces.append(tuple(tokenizer(shown[begin:place], add_special_tokens=False).input_ids))
        begin = place + len(word)
    return (pieces[0], pieces[1], pieces[2]) if all(pieces[:2]) else ((), (), ())


def common_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """Token ids that can begin a document: words or beginnings of words among the vocabulary's first part."""
    special = set(tokenizer.all_special_ids)
    most = min(vocabulary, len(tokenizer))
    first = [i for i in range(max(most // COMMON, min(most, 512))) if i not in special]
    words = []
    for index, name in zip(first, tokenizer.convert_ids_to_tokens(first), strict=True):
        text = tokenizer.decode([index])
        if len(text.strip()) > 1 and text.strip().isalpha() and (name[0] in "Ġ▁" or text[0].isupper()):
            words.append(index)
    return words if len(words) >= 64 else first or list(range(most))


class Writer:
    """What one row writes next: tokens that are given (starts, turns) before those that were sampled."""

    def __init__(self, starts: Starts, talk: bool, generator: torch.Generator) -> None:
        self.starts, self.talk, self.generator = starts, talk and bool(starts.opening), generator
        self.user = True  # whose turn it is
        self.queue = list(starts.opening) if self.talk else self._document()

    def given(self) -> int:
        return self.queue.pop(0)

    def next(self, sampled: int) -> int:
        """The row's next token; `sampled` is dropped while given ones remain."""
        if self.queue:
            return self.given()
        if sampled in self.starts.ends:
            self.queue = self._turn(sampled) if self.talk else self._document()
        return sampled

    def _document(self) -> list[int]:
        common = self.starts.common
        choice = int(torch.randint(len(common), (1,), generator=self.generator))
        return [*self.starts.document, common[choice]]

    def _turn(self, end: int) -> list[int]:
        """What follows the end of a turn: the template's words up to the other side's first, or a new conversation."""
        piece = self.starts.to_assistant if self.user else self.starts.to_user
        self.user = not self.user
        if not piece:
            self.user = True
            return list(self.starts.opening)
        return list(piece[1:] if piece[0] == end else piece)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU has instructions that multiply in it, else float32."""
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}
    return torch.bfloat16 if any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32
