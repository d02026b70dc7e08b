"""The stand-in checkpoint that tests of text share."""

from __future__ import annotations

import pytest

from .words import stand_in, word_tokenizer


@pytest.fixture(scope="session")
def checkpoint():
    return stand_in(word_tokenizer())
