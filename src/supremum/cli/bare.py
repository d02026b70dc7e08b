"""`--frontier` and `--scaling` with their value, or without: Typer has no option whose value may be left out."""

from __future__ import annotations

import re

import typer
from typer.core import TyperCommand

DEFAULT = "default"  # stands for the value that was left out


class BareFrontier(TyperCommand):
    """A command in which `--frontier` alone means `--frontier default`."""

    option, value = "--frontier", rf"{DEFAULT}|[\d.]+|[^-/][^/]*,[^/]*"

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        words = []
        for word, following in zip(args, [*args[1:], ""], strict=True):
            words.append(word)
            if word == self.option and not re.fullmatch(self.value, following):
                words.append(DEFAULT)
        return super().parse_args(ctx, words)


class BareScaling(BareFrontier):
    """A command in which `--scaling` alone means `--scaling default`."""

    option, value = "--scaling", r"[^-].*"


def bits_option(text: str) -> str:
    """A list of bits a weight such as "2.5,3,4", looked at; wrong input is wrong usage (exit 2)."""
    try:
        values = [float(word) for word in text.split(",")] if text != DEFAULT else []
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers; write it like 2.5,3,4") from error
    if any(not 1 <= value <= 16 for value in values):
        raise typer.BadParameter(f"{text!r}: bits a weight are from 1 to 16")
    return text
