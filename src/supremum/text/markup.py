"""HTML to text: what a reader of the page would read, one line a block.

Scripts, styles, forms and navigation are left out (forms and navigation stay with `keep_furniture`), entities become
characters, white space is one space as in a browser, <pre> stays as it is. Only the token level of the HTML standard
(section 13.2.5) is followed, in one pass whose time is linear in the text: the standard library's html.parser is quadratic
on hostile input (one million of "<a " did not end in four minutes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape

RAW = {"script", "style", "noscript", "template", "svg", "iframe", "object", "textarea", "title"}  # to their end tag
FURNITURE = {"nav", "header", "footer", "aside", "form", "button", "select", "head"}
BLOCKS = {"address", "article", "blockquote", "body", "br", "caption", "center", "dd", "details", "div", "dl", "dt",
          "fieldset", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "html", "li", "main", "ol", "p",
          "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"} | FURNITURE
DOCUMENT = re.compile(r"\s*<(!doctype\s+html|html\b)", re.IGNORECASE)
TAG = re.compile(r"</(?:a|b|body|div|em|h[1-6]|html|i|li|ol|p|script|span|strong|style|table|td|tr|ul)\s*>|<(?:br|p)\s*/?>",
                 re.IGNORECASE)
NAME = re.compile(r"[a-zA-Z][^\s/>]*")
SPACE = re.compile(r"[ \t\n\r\f]+")
QUOTED = re.compile(r"""=\s*("[^"]*|'[^']*)$""")
KEPT = "\ue000"  # stands for a space inside <pre> until the lines are trimmed


def is_html(text: str) -> bool:
    """A page, or a text with at least two of the tags that pages are made of in its first 64 KiB."""
    return bool(DOCUMENT.match(text)) or len(TAG.findall(text[:1 << 16])) >= 2


def html_to_text(text: str, *, keep_furniture: bool = False) -> str:
    hidden = set() if keep_furniture else FURNITURE
    parts: list[str] = []
    inside: list[str] = []  # the hidden elements that are open
    pre = 0
    for name, closing, data in tokens(text):
        if name is None:
            if not inside:
                data = unescape(data)
                parts.append(data.replace(" ", KEPT) if pre else SPACE.sub(" ", data))
            continue
        if name in hidden:
            if not closing:
                inside.append(name)
            elif name in inside:
                while inside.pop() != name:
                    pass
        if name in ("body", "main", "article") and not closing:
            inside.clear()  # whatever was not closed before the text began
        if name == "pre":
            pre = 0 if closing else 1
        if name in BLOCKS and not inside:
            parts.append("\n")
    lines = (line.strip(" ") for line in "".join(parts).split("\n"))
    return "\n".join(line for line in lines if line).replace(KEPT, " ").strip("\n")


def tokens(text: str) -> Iterator[tuple[str | None, bool, str]]:
    """(tag, whether it closes, "") for each tag, (None, False, data) for what stands between; raw elements are left out."""
    position = start = 0  # `start`: where the pending data begins
    while (opening := text.find("<", position)) >= 0:
        position = opening + 1
        if text.startswith("!--", position):
            end = text.find("-->", position + 1)
            after = len(text) if end < 0 else end + 3
            name, closing = None, False
        else:
            closing = text.startswith("/", position)
            found = NAME.match(text, position + closing)
            if not found and text[position:position + 1] not in ("!", "?", "/"):
                continue  # a bracket that is text, as in a < b
            if (end := text.find(">", position)) < 0:
                break  # nothing closes any more
            if QUOTED.search(text, max(position, end - 2048), end):  # the bracket stands in an attribute's value
                quote = '"' if text.rfind('"', position, end) > text.rfind("'", position, end) else "'"
                end = text.find(">", max(end, text.find(quote, end)))
            after = len(text) if end < 0 else end + 1
            name = found[0].lower() if found else None
        if start < opening:
            yield None, False, text[start:opening]
        if name in RAW and not closing:
            last = re.compile(f"</{name}", re.IGNORECASE).search(text, after)
            end = text.find(">", last.end()) if last else -1
            after = len(text) if end < 0 else end + 1
        elif name:
            yield name, closing, ""
        position = start = after
    if start < len(text):
        yield None, False, text[start:]
