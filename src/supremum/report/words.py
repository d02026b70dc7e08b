"""What a run found, in words and figures; the page, the model card and the terminal all take them from here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..runtime import capabilities, names
from ..sizes import UNKNOWN, figure, format_size
from .document import Document


def percent(share: float | None, digits: int = 1) -> str:
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"


def seconds(value: float) -> str:
    """"850 ms", "12.3 s", "2 min 05 s", "3 h 07 min"."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plus_minus(value: float | None, error: float | None) -> str:
    """"0.0654 ± 0.0019": the error with two significant figures, the value to the same place."""
    if value is None or error is None or error <= 0:
        return figure(value)
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{places}f} ± {error:.{places}f}"


def of_hidden_states(document: Document) -> bool:
    """Whether the KL is that of the last hidden states, read as Gaussians (measure/scores.py): the model says no tokens."""
    return document["result"]["measured"].get("objective") == "none"


def headline(document: Document) -> str:
    """"SmolLM2-135M-Instruct: 269 MB → 80.0 MB"."""
    return (f"{document['inputs']['name']}: {format_size(document['inputs']['bytes'])} → "
            f"{format_size(document['result']['bytes'])}")


def verdict(document: Document) -> str:
    """One sentence: how far from the original, how far from the limit, and who vouches for it."""
    measured, parts = document["result"]["measured"], []
    if measured["kl_mean"] is not None:
        parts.append(f"KL {plus_minus(measured['kl_mean'], measured['kl_se'])} nats a token "
                     f"{'of the last hidden states ' if of_hidden_states(document) else ''}from the original")
    if document["result"]["gap_bits"] is not None:
        parts.append(f"{document['result']['gap_bits']:.2f} bits a weight above the limit")
    return "; ".join((", ".join(parts), vouched(document)) if parts else (vouched(document),)) + "."


def attested(proof: Mapping[str, Any]) -> str:
    """A conversion's proof in one line."""
    said = proof.get("means") or vouched({"proof": proof})  # type: ignore[typeddict-item]
    return f"{said[0].upper()}{said[1:]}."


def vouched(document: Document) -> str:
    """"proved in llama.cpp (xllamacpp 2026.10.11549)", or what is missing for a proof: `verify` passes or raises."""
    proof = document["proof"]
    if not proof["positions"]:
        package = capabilities(proof["runtime"]).package if proof["runtime"] in names() else proof["runtime"]
        return f"not proved in a stock runtime: install {package}"
    return f"proved in {runtime(document)}"


def runtime(document: Document) -> str:
    """"llama.cpp (xllamacpp 2026.10.11549)"."""
    proof = document["proof"]
    name = capabilities(proof["runtime"]).title if proof["runtime"] in names() else proof["runtime"]
    return f"{name} ({proof['version']})" if proof["version"] else name


def budget(document: Document) -> str:
    """The budget as it was given: "80.0 MB and KL at most 0.05"."""
    given = document["budget"]
    parts = [] if given["size"] is None else [f"{format_size(given['size'])}"]
    parts += [] if given["bits"] is None else [f"{figure(given['bits'])} bits a weight"]
    parts += [] if given["max_kl"] is None else [f"KL at most {figure(given['max_kl'])}"]
    parts += [] if given.get("memory") is None else [f"{format_size(given['memory'] or 0)} of memory"]
    parts += [] if given.get("speed") is None else [f"speed {given['speed']}"]
    floor = document["result"].get("floor")
    parts += [f"{floor['metric']} at least {figure(floor['least'], 4)}"] if floor else []
    return " and ".join(parts) or "none"


def bought(stage: Mapping[str, Any], spent: float) -> str:
    """What a stage took off the KL: "KL 0.31 to 0.27 in 2 min 00 s: 0.02 a minute". spent: seconds."""
    before, after = stage["kl_before"], stage["kl_after"]
    return (f"KL {figure(before)} to {figure(after)} in {seconds(spent)}: "
            f"{figure((before - after) / max(spent, 1e-9) * 60)} a minute")


def facts(document: Document) -> list[tuple[str, str, str]]:
    """(label, value, what it means) of the figures that matter most."""
    result, source = document["result"], document["inputs"]
    measured = result["measured"]
    rows = [
        ("Size", format_size(result["bytes"]), f"was {format_size(source['bytes'])}, budget {budget(document)}"),
        ("Bits a weight", figure(result["bits_per_weight"]), "linear layers of the blocks, scales included"),
    ]
    if floor := result.get("floor"):
        for name in ("valid", "test"):
            now, was, change = (floor[part][name] for part in ("reached", "original", "change"))
            asked = f"; asked at least {figure(floor['least'], 4)} ({floor['asked']})" if name == "valid" else ""
            rows.append((f"{floor['metric']}, {floor['rows'][name]:,} {name} rows",
                         f"{figure(now['value'], 4)} ({figure(now['low'], 4)} to {figure(now['high'], 4)})",
                         f"was {figure(was['value'], 4)}; change {change['value']:+.4g} ({change['low']:+.4g} to "
                         f"{change['high']:+.4g}){asked}; 95 % intervals"))
    for line in result.get("running", []):
        rows.append((f"{line['name'].capitalize()} in {runtime(document)}", line["reached"],
                     f"asked {line['asked']}{'' if line['held'] else ': NOT held'}; was {line['original']}; {line['note']}"))
    if measured["kl_mean"] is not None:
        hidden = of_hidden_states(document)
        rows.append(("KL of the hidden states" if hidden else "KL from the original",
                     plus_minus(measured["kl_mean"], measured["kl_se"]),
                     f"{'the last, read as Gaussians; ' if hidden else ''}nats a token; median "
                     f"{figure(measured['kl_median'])}, 99th percentile {figure(measured['kl_p99'])}"))
    if swaps := result.get("swaps"):
        rows.append(("Swapped formats", f"{swaps['accepted']} of {swaps['trials']} tried",
                     f"{bought(swaps, swaps['seconds'])}, on the candidates"))
    if gains := result.get("gains"):
        spent = sum(one["seconds"] for one in gains["passes"])
        rows.append(("Trained gains and scales", f"{gains['numbers']:,}",
                     f"{bought(gains, spent)}, {len(gains['passes'])} pass{'es' * (len(gains['passes']) != 1)}"))
    if measured["same_top"] is not None:
        rows.append(("Same next token", percent(measured["same_top"]),
                     "positions where both models prefer the same token"))
    if measured["perplexity"] is not None:
        rows.append(("Perplexity", plus_minus(measured["perplexity"], measured["perplexity_se"]),
                     f"was {figure(measured['perplexity_reference'], 4)}, held-out text"))
    if result["gap_bits"] is not None:
        rows.append(("Above the limit", f"{result['gap_bits']:.2f} bits",
                     f"a weight; no code of these weights has KL below {figure(result['limit_kl'])} at these bits"))
    return rows


def agreement(document: Document) -> list[tuple[str, str]]:
    """The runtime's answers against our own decoding of the same file; nothing without it."""
    proof = document["proof"]
    if not proof["positions"]:
        return []
    rows = [("KL from our decoding, nats", figure(proof["kl_mean"])),
            ("relative error of log-probabilities", figure(proof["relative_error"])),
            (f"same token, of {proof['positions']} positions", percent(proof["same_top"], 0))]
    same = dict(proof).get("same_tokens")
    return rows if same is None else [*rows, ("its tokenizer gives our tokens", "yes" if same else "no")]


def speeds(document: Document) -> list[tuple[str, str]]:
    """What the runtime did on this machine, in the proof's process; nothing without it."""
    proof = document["proof"]
    if not proof["positions"]:
        return []
    decode = [("decode, tokens/s", figure(proof["decode_tokens_per_second"]))] if proof["decode_tokens_per_second"] else []
    return [("prefill, tokens/s", figure(proof["prefill_tokens_per_second"])), *decode,
            ("load", seconds(proof["load_seconds"])), ("memory", format_size(proof["memory"])),
            ("threads", str(proof["threads"]))]


def limit_values(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every {value, unit, kind, note} in the limits, with the words that lead to it."""
    if isinstance(tree, dict):
        if {"value", "unit", "kind"} <= tree.keys():
            yield path, tree
            return
        for key, item in tree.items():
            yield from limit_values(item, (*path, str(key).replace("_", " ")))
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            name = item.get("name", item.get("label", index + 1)) if isinstance(item, dict) else index + 1
            yield from limit_values(item, (*path, str(name)))


def with_unit(value: dict[str, Any]) -> str:
    """A limit's figure with its unit; bytes in the unit that suits them."""
    if value["unit"] == "bytes" and value["value"] is not None:
        return format_size(value["value"])
    return f"{figure(value['value'])} {value['unit']}"


def one_line(text: str) -> str:
    """`text` on one line, without control characters (names may hold terminal escapes)."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def first_difference(one: str, other: str) -> tuple[str, tuple[str, str], tuple[str, str]]:
    """(common start, (first differing word, rest) of `one`, the same of `other`); the words are empty for equal texts.

    The common start ends at a word's beginning, so that whole words are marked.
    """
    if one == other:
        return one, ("", ""), ("", "")
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    while length and not one[length - 1].isspace():
        length -= 1
    return one[:length], _word(one[length:]), _word(other[length:])


def _word(text: str) -> tuple[str, str]:
    end = next((i for i, c in enumerate(text) if c.isspace()), len(text))
    return text[:end], text[end:]
