"""report.html, README.md and the closing table: complete, harmless with hostile text, and free of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from report_sample import build

from supremum.errors import StateError
from supremum.report import write_report
from supremum.report.card import card
from supremum.report.charts import charts, place_of
from supremum.report.frontier import FILE, assemble_frontier, frontier_lines, read_frontier, write_frontier
from supremum.report.html import frontier_page, page, script_json
from supremum.report.terminal import result_lines

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&<!--\x1b[31m"


class Elements(HTMLParser):
    """Every start tag with its attributes, the text of each script, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.visible: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.visible.append(data)


def hostile(value: Any) -> Any:
    """The sample with every free text replaced by markup; names that the schema fixes stay."""
    if isinstance(value, dict):
        fixed = ("schema", "kind", "unit", "target")
        return {key: item if key in fixed else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture(scope="module")
def html() -> str:
    return page(build())


def test_the_page_shows_the_figures_that_matter(html: str) -> None:
    text = " ".join(" ".join(Elements(html).visible).split())
    for expected in ("SmolLM2-135M-Instruct", "269 MB", "0.0654 ± 0.0019", "87.1 %", "24.61 ± 0.42", "1.23 bits",
                     "llama.cpp (xllamacpp 2026.10.11549)", "What is the capital of France", "160 (176)", "sweep",
                     "supremum optimize models/smollm2", "8f14e45fceea167a"):
        assert expected in text, expected
    assert html.count("<mark>") == 2  # one pair differs, the other is equal


def test_the_page_loads_nothing(html: str) -> None:
    for tag, attributes in Elements(html).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        assert not {"src", "srcset", "data", "action", "ping", "background"} & attributes.keys(), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    ours = html.replace(get_plotlyjs(), "")
    assert "//" not in re.sub(r"// Draws the figures[^\n]*", "", ours), "an address outside plotly's own source"
    assert "@import" not in ours and "url(" not in ours


def test_the_policy_allows_exactly_the_scripts_of_the_page(html: str) -> None:
    elements = Elements(html)
    policy = next(a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.split("script-src")[1] and "http" not in policy
    executable = [text for text in elements.scripts if text.strip() and not text.startswith("{")]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in executable]
    assert len(hashes) == 2 and all(value in policy for value in hashes)


def test_hostile_text_stays_text() -> None:
    clean, dirty = Elements(page(build())), Elements(page(hostile(build())))
    allowed = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in dirty.tags} <= allowed
    assert len(dirty.scripts) == len(clean.scripts) == 3
    assert not any(name.startswith("on") for _, attributes in dirty.tags for name in attributes)
    assert any("onerror=alert(2)" in text for text in dirty.visible)
    figures = dirty.scripts[0]
    assert "<" not in figures and json.loads(figures)
    assert "<img" not in json.dumps(json.loads(figures)), "plotly would read it as markup"


def test_json_in_a_script_element_cannot_end_it() -> None:
    text = script_json({"a": HOSTILE, "b": float("nan")})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": None}


def test_charts_hold_the_documents_own_figures() -> None:
    document = build()
    found = charts(document)
    star = next(trace for trace in found["frontier"]["size"]["data"] if trace["name"] == "this file")
    assert star["x"] == [document["result"]["bytes"] / 1e6] and star["y"] == [0.0654]
    grid = found["layers"]["damage"]["data"][0]
    embedding = document["plan"][-1]["share"]
    assert sum(v for row in grid["z"] for v in row) == pytest.approx(100 * (1 - embedding))
    assert len(grid["x"]) == 30 and len(grid["y"]) == 7
    total = sum(sum(trace["x"]) for trace in found["bytes"]["bytes"]["data"])
    assert total == pytest.approx(document["result"]["bytes"] / 1e6)


def test_the_gap_is_drawn_from_the_limit_to_the_file() -> None:
    document = build()
    line = charts(document)["frontier"]["bits"]["layout"]["shapes"][0]
    # the sample's limit is KL = 4 * 4^-bits exactly, so the line must start where that reaches 0.0654
    assert 4.0 * 4 ** -line["x0"] == pytest.approx(0.0654, rel=1e-6)
    assert line["x1"] == document["result"]["bits_per_weight"]


@pytest.mark.parametrize(("name", "place"), [
    ("model.layers.12.mlp.up_proj.weight", (12, "mlp.up_proj")),
    ("transformer.h.0.attn.c_attn.weight", (0, "attn.c_attn")),
    ("bert.encoder.layer.3.output.dense.weight", (3, "output.dense")), ("lm_head.weight", (None, "lm_head")),
    ("model.embed_tokens.weight", (None, "embed_tokens")),
    ("model.layers.4.experts.7.w1.weight", (4, "experts.7.w1")),
])
def test_names_are_split_into_block_and_projection(name: str, place: tuple[int | None, str]) -> None:
    assert place_of(name) == place


@pytest.mark.parametrize("change", [
    {"plan": []}, {"frontier": []}, {"samples": []}, {"phases": []}, {"limits": {}}, {"assumptions": []},
])
def test_an_empty_section_does_not_stop_the_report(change: dict[str, Any], tmp_path: Path) -> None:
    document = {**build(), **change}
    document["result"].update(gap_bits=None, limit_kl=None, limit_bits=None, budget_bytes=None)
    assert write_report(document, tmp_path).stat().st_size > 1e6
    assert max(map(len, result_lines(document, Path("out"))[:-2])) <= 80


def test_an_encoder_without_a_head_has_a_report_too() -> None:
    document = build()
    document["result"].update(gap_bits=None, limit_kl=None)
    document["result"]["measured"] = {**dict.fromkeys(document["result"]["measured"]), "tokens": 4096, "windows": 8,
                                      "cosine_mean": 0.998}
    assert "proved in llama.cpp" in page(document) and "proved in llama.cpp" in card(document).lower()
    assert "perplexity" not in "\n".join(result_lines(document, Path("out")))


def test_a_lossless_result_can_be_drawn() -> None:
    document = build()
    document["result"]["measured"].update(kl_mean=0.0, kl_se=0.0)
    assert "KL 0 nats a token" in page(document)


def test_the_closing_table_fits_80_columns_without_colour() -> None:
    lines = result_lines(build(), Path("demo"))
    assert max(map(len, lines[:-2])) <= 80 and "\x1b" not in "".join(lines)
    text = "\n".join(lines)
    for expected in ("269 MB", "3.2", "97", "24.61", "± 0.42", "0.0654", "± 0.0019", "87.1 %", "0.0119", "1.23 bits",
                     "proof passed", "demo/model.gguf", "demo/report.html"):
        assert expected in text, expected
    assert "\x1b" not in "".join(result_lines(hostile(build()), Path("demo\x1b[2J")))


def test_the_card_tells_how_to_run_it_and_escapes_what_it_quotes() -> None:
    text = card(build())
    for expected in ("llama-server -m model.gguf", "0.0654 ± 0.0019", "Licence", "supremum optimize"):
        assert expected in text
    assert "NOT" not in text
    body = card(hostile(build())).partition("\n# ")[2]
    body = re.sub(r"\\[^\w\s]", "", body)  # escaped characters are text
    assert "<" not in re.sub(r"```.*?```|`[^`]*`", "", body, flags=re.DOTALL)
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        line for line in text.splitlines() if line.startswith("## ")]


@pytest.mark.parametrize(("architecture", "codecs", "loader", "vllm"), [
    ("LlamaForCausalLM", ["int4-g64", "int8-channel", "as it is"], "AutoModelForCausalLM", True),
    ("LlamaForCausalLM", ["int4-g64", "int3-g64"], "AutoModelForCausalLM", False),
    ("BertForMaskedLM", ["int4-g64"], "AutoModelForMaskedLM", False),
    ("BertModel", ["int8-g32"], "AutoModel", False),
])
def test_the_card_of_compressed_tensors_names_only_what_runs_it(architecture, codecs, loader, vllm) -> None:
    document = build()
    document["inputs"]["architecture"] = architecture
    document["result"].update(target="compressed-tensors", file=".")
    document["plan"] = [{**document["plan"][0], "codec": codec} for codec in codecs]
    assert f'model = {loader}.from_pretrained(".")' in card(document)
    assert ("vllm serve ." in card(document)) == vllm


def frontier(documents: list[Any]) -> Any:
    return assemble_frontier([(3.0 + i, document) for i, document in enumerate(documents)], [(2.0, "too few " + HOSTILE)],
                             command="supremum " + HOSTILE, asked=[2.0, 3.0, 4.0])


def test_a_frontier_is_drawn_from_its_points_and_hostile_text_stays_text(tmp_path: Path) -> None:
    better = build()
    better["result"]["measured"]["kl_mean"] /= 4
    better["frontier"][0]["bytes"] -= 1000  # of the limit's first point: fewer bytes outside the blocks
    found = frontier([build(), better])
    assert [point["kl"] for point in found["frontier"] if point["kind"] == "measured"] == [0.0654, 0.0654 / 4]
    assert found["frontier"][0]["bytes"] == better["frontier"][0]["bytes"]
    write_frontier(found, tmp_path)
    assert read_frontier(tmp_path) == found
    assert all(len(line) <= 80 for line in frontier_lines(found, Path("points")))
    dirty = Elements(frontier_page(frontier([hostile(build()), hostile(better)])))
    clean = Elements((tmp_path / "frontier.html").read_text())
    assert len(dirty.scripts) == len(clean.scripts) == 3
    assert {tag for tag, _ in dirty.tags} == {tag for tag, _ in clean.tags}
    assert [a["href"] for tag, a in dirty.tags if tag == "a"] == ["#main", "./3/report.html", "./4/report.html"]
    assert "<img" not in dirty.scripts[0] and "//" not in (tmp_path / "frontier.html").read_text().replace(
        get_plotlyjs(), "").replace("// Draws the figures", "")


def test_a_damaged_frontier_is_refused(tmp_path: Path) -> None:
    write_frontier(frontier([build()]), tmp_path)
    for text, message in (("{", "not valid JSON"), (json.dumps({"schema": "x"}), "is missing")):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(StateError, match=message):
            read_frontier(tmp_path)


def test_without_the_stock_runtime_no_page_claims_a_proof(tmp_path: Path) -> None:
    document = build()
    nothing = dict.fromkeys(("kl_mean", "relative_error", "same_top", "prefill_tokens_per_second",
                             "decode_tokens_per_second"))  # fmt: skip
    document["proof"].update(nothing, runtime="gptqmodel", version="", passed=False, positions=0)
    write_report(document, tmp_path)
    shown = "".join(Elements((tmp_path / "report.html").read_text(encoding="utf-8")).visible)
    closing = "\n".join(result_lines(document, tmp_path))
    for text in (shown, closing, card(document)):
        assert re.search("not proved in a stock runtime: install gptqmodel", text, re.IGNORECASE)
        assert "fresh process" not in text and "passed" not in text.lower()
