"""README.md of the output folder: a model card that says how to run the file, how good it is and how it was made."""

from __future__ import annotations

import json
import re

from ..checkpoint.targets import target
from ..sizes import format_size
from . import words
from .document import Document


def card(document: Document) -> str:
    """The card as Markdown; every text of the document is escaped."""
    source, result, text = document["inputs"], document["result"], document["text"]
    rows = "\n".join(f"| {label} | {_text(value)} | {_text(means)} |" for label, value, means in words.facts(document))
    agreement = "; ".join(f"{_text(key)} {_text(value)}" for key, value in words.agreement(document))
    proved = (f"Proved by a fresh process in {_text(words.runtime(document))}: {agreement}" if agreement
              else _text(f"N{words.vouched(document)[1:]}"))
    assumptions = "\n".join(f"- {_text(line)}" for line in document["assumptions"])
    run = target(result["target"]).how_to_run(
        _code(source["architecture"]), {layer["codec"] for layer in document["plan"]} - {"as it is"}, _code(result["file"]))
    return f"""---
base_model: {json.dumps(source["model"])}
tags: [supremum, {result["target"]}, quantized]
---

# {_text(source["name"])}, compressed from {format_size(source["bytes"])} to {format_size(result["bytes"])}

{_text(words.verdict(document))}

## Run it

{run}

## Figures

| | | |
|---|---|---|
{rows}

KL, agreement and perplexity were measured on {text["held_out_tokens"]:,} tokens that the model was not calibrated on
({_text(text["held_out"])}). {proved}.

{assumptions}

`report.html` shows every layer; `supremum.json` holds every figure.

## How it was made

```sh
{_code(document["command"])}
```

Supremum {_text(document["supremum_version"])}, seed {source["seed"]}, calibration on {_text(text["calibration"])}
({text["calibration_tokens"]:,} tokens). Original: `{_code(source["model"])}`, fingerprint
`{_code(source["fingerprint"][:16])}`.

## Licence

The compressed weights are a derived work of the original: the original model's licence applies to them.
"""


def _text(text: str) -> str:
    """`text` as plain words on one line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", words.one_line(text))


def _code(text: str) -> str:
    """`text` within back-ticks: on one line, without back-ticks."""
    return words.one_line(text).replace("`", "'")
