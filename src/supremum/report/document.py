"""supremum.json: everything that a run found, in one file from which its report can be drawn again.

The sections are typed dictionaries, so that what is written is what is documented here. Sizes are bytes, times seconds,
KL nats per token, bits are per weight; null stands for "not known". `validate` checks a document against these types:
a missing field, a wrong type or another schema version is refused by its path. Unknown extra fields are allowed.
"""

from __future__ import annotations

import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from ..errors import StateError
from ..plain import plain

SCHEMA = "supremum/1"
FILE = "supremum.json"
Number = Union[float, None]  # noqa: UP007  (evaluated at run time by `validate`)


class Inputs(TypedDict):
    """What went in. Together with `command` and `versions` it fixes the output's bytes."""

    name: str  # for people: "SmolLM2-135M-Instruct"
    model: str  # as it was given
    format: str  # "safetensors" | "gguf" | "compressed-tensors"
    architecture: str
    fingerprint: str  # of config, weights and tokenizer
    bytes: int  # of the stored weights
    parameters: int
    text_fingerprint: str
    seed: int
    options: dict[str, Any]


class Text(TypedDict):
    """Where the tokens came from; held-out text is never calibrated on."""

    calibration: str
    calibration_tokens: int
    held_out: str
    held_out_tokens: int


class Machine(TypedDict):
    cpu: str
    cores: int
    ram_bytes: int
    os: str


class Budgets(TypedDict):
    size: int | None
    bits: Number
    max_kl: Number


class BudgetSection(Budgets, total=False):
    memory: int | None
    speed: str | None


class Running(TypedDict):
    """A budget of the running file, in words: what was asked for, and what both files do on this machine."""

    name: str  # "memory", "speed"
    asked: str
    reached: str
    original: str
    held: bool
    note: str


class Layer(TypedDict):
    """One tensor of the plan. `share` is its part (0..1) of the predicted damage of all of them."""

    name: str
    shape: list[int]
    codec: str
    bits_per_weight: float
    bytes: int
    predicted_nats: float  # of the layers prices.py's, of tables measured, of an archive K-FAC in the metric it was solved in
    share: float
    reason: str
    limit_bits: Number  # what the bound would spend here at the same KL of the whole model
    gap_bits: Number


class Point(TypedDict):
    """One point of the frontier."""

    bits: float
    bytes: int | None
    kl: float
    kind: Literal["predicted", "measured", "limit"]
    label: str


class Measured(TypedDict):
    """`measure.Quality.to_dict()` on held-out text, of the solved weights in the run's compute dtype. Of a model without a
    vocabulary head only the KL is given; the rest is null."""

    perplexity: Number
    perplexity_se: Number
    perplexity_reference: Number
    kl_mean: Number
    kl_se: Number
    kl_median: Number
    kl_p99: Number
    same_top: Number
    tokens: int
    windows: int


class ResultBase(TypedDict):
    target: str
    file: str  # what the runtime opens, relative to the folder
    bytes: int
    budget_bytes: int | None
    bits_per_weight: float  # of the blocks' linear layers, scales and tables included
    predicted_kl: Number
    measured: Measured
    limit_kl: Number  # least KL of any code of these bits
    limit_bits: Number  # least bits of any code of this KL
    gap_bits: Number


class Swaps(TypedDict):
    """A search for better formats by true KL on the held-out text, on the candidates."""

    trials: int
    accepted: int
    kl_before: float
    kl_after: float
    seconds: float


class FoldedPair(TypedDict):
    """A norm or linear layer divided by factors that the layers after it are multiplied by. Errors: of the readers' outputs,
    weights and inputs rounded, relative squares summed over the readers."""

    producer: str
    readers: list[str]
    codec: str
    exponent: Number  # null where no factor lowered the error
    error_before: float
    error_after: float


class Smoothing(TypedDict):
    pairs: list[FoldedPair]
    not_folded: list[str]  # the first reader of each input that is made by nothing that can be divided


class Pass(TypedDict):
    """All calibration windows once; seconds of training, the measurement not counted."""

    kl: float  # after it, on the held-out text
    seconds: float


class Gains(TypedDict):
    """Norms, biases and scales of rows, trained through the whole model (solve/gains.py)."""

    numbers: int  # that were trained
    kl_before: float
    kl_after: float
    passes: list[Pass]


class Score(TypedDict):
    """A figure with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


class Splits(TypedDict):
    valid: Score
    test: Score


class Tried(TypedDict):
    bits: Number
    bytes: int
    value: float  # of the metric, on the valid rows
    error: float  # standard error of its change
    held: bool


class FloorBase(TypedDict):
    """A task's metric as the budget (floor.py). `change`: the file's minus the original's, on the same rows."""

    asked: str  # "accuracy=0.99x"
    metric: str
    least: float
    searched: bool  # the bits were searched for; else one file was checked
    rows: dict[str, int]
    original: Splits
    reached: Splits
    change: Splits
    tried: list[Tried]
    held_on_test: bool  # whether the test rows, which had no part in the choice, agree


class Floor(FloorBase, total=False):
    digests: dict[str, str]  # of the rows, which a finished run is known by


class ResultSection(ResultBase, total=False):
    floor: Floor
    running: list[Running]
    swaps: Swaps | None
    smoothing: Smoothing | None
    gains: Gains | None


class Proof(TypedDict):
    """`runtime.verify.Proof.asdict()`: a fresh process loaded the files in the stock runtime. No positions: it is not
    installed, and nothing was proved."""

    runtime: str
    version: str  # of the package that brings it: "xllamacpp 2026.10.11549"
    passed: bool
    positions: int
    kl_mean: Number
    relative_error: Number
    same_top: Number
    load_seconds: float
    prefill_tokens_per_second: Number
    decode_tokens_per_second: Number
    memory: int
    threads: int


class Phase(TypedDict):
    name: str
    seconds: float
    peak_rss_mb: Number


class Sample(TypedDict):
    prompt: str
    original: str
    compressed: str


class Document(TypedDict):
    schema: str
    supremum_version: str
    command: str
    inputs: Inputs
    text: Text
    versions: dict[str, str]
    machine: Machine
    limits: dict[str, Any]  # "information" and "hardware", as `limits` reports them
    budget: BudgetSection
    plan: list[Layer]
    frontier: list[Point]
    result: ResultSection
    proof: Proof
    phases: list[Phase]
    samples: list[Sample]
    assumptions: list[str]


def validate(document: Any, source: str = FILE) -> Document:
    """`document` itself, if it follows the schema. Raises StateError naming the first field that does not."""
    if not isinstance(document, dict) or "schema" not in document:
        raise StateError(f"{source}: not a Supremum document (no schema).", "Give the folder of a finished run.")
    if document["schema"] != SCHEMA:
        raise StateError(f"{source}: has schema {str(document['schema'])[:40]!r}, this version reads {SCHEMA!r}.",
                         "Use the version of Supremum that wrote it, or run `supremum optimize` again.")
    wrong = mismatch(document, Document, "")
    if wrong:
        raise StateError(f"{source}: {wrong}.", "The file was edited or damaged; run `supremum optimize` again.")
    return typing.cast(Document, document)


def read_document(folder: Path) -> Document:
    """The document of a finished run. Raises StateError when there is none or it does not follow the schema."""
    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise StateError(f"{folder}: holds no {FILE}.", "Give the folder that `supremum optimize --out DIR` wrote.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: not valid JSON ({error}).", "Run `supremum optimize` again.") from error
    return validate(document, str(path))


def encode(document: Document) -> bytes:
    """The bytes of supremum.json. Raises StateError when `document` does not follow the schema."""
    clean = plain(document)
    validate(clean)
    return (json.dumps(clean, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def mismatch(value: Any, wanted: Any, path: str) -> str | None:
    """What is wrong with `value` as a `wanted`, or None."""
    origin = get_origin(wanted)
    if wanted is Any:
        return None
    if origin in (Union, types.UnionType):
        wrongs = [mismatch(value, option, path) for option in get_args(wanted)]
        return None if None in wrongs else wrongs[0]
    if origin is Literal:
        return None if value in get_args(wanted) else f"{path} is {str(value)[:40]!r}, not one of {get_args(wanted)}"
    if typing.is_typeddict(wanted):
        if not isinstance(value, dict):
            return f"{path} is not an object"
        for key, hint in get_type_hints(wanted).items():
            where = f"{path}.{key}".lstrip(".")
            wrong = mismatch(value[key], hint, where) if key in value else \
                f"{where} is missing" if key in wanted.__required_keys__ else None
            if wrong:
                return wrong
        return None
    if origin is list:
        if not isinstance(value, list):
            return f"{path} is not a list"
        items = (mismatch(item, get_args(wanted)[0], f"{path}[{i}]") for i, item in enumerate(value))
        return next((wrong for wrong in items if wrong), None)
    if origin is dict:
        if not isinstance(value, dict):
            return f"{path} is not an object"
        items = (mismatch(item, get_args(wanted)[1], f"{path}.{key}") for key, item in value.items())
        return next((wrong for wrong in items if wrong), None)
    if wanted is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    elif wanted is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    else:
        ok = isinstance(value, wanted)
    return None if ok else f"{path} is {str(value)[:40]!r}, not of type {getattr(wanted, '__name__', wanted)}"
