"""Small pieces of HTML: escaping, intervals, tables, sections."""

import html
import re
from collections.abc import Sequence
from typing import Any

from controller.record.number_text import bounds, num
from controller.report.style import CSS

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def esc(text: Any) -> str:
    """Text for an element or an attribute. Control characters, which no HTML may hold, become a visible mark."""
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text)), quote=True)


def interval(values: Any, digits: int = 2, signed: bool = False, share: bool = False) -> str:
    """A mean with its 95% interval beside it, small."""
    mean, low, high = (v * 100 if share and v is not None else v for v in bounds(values))
    unit = "%" if share and mean is not None else ""
    text = f'<span class="mean">{num(mean, digits, signed)}{unit}</span>'
    if low is not None and high is not None:
        text += f' <span class="ci">[{num(low, digits, signed)}, {num(high, digits, signed)}]</span>'
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "", text_columns: int = 1) -> str:
    """A table of ready HTML cells; the first `text_columns` columns are text, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        out = []
        for i, cell in enumerate(row):
            scope = ' scope="col"' if tag == "th" else ""
            kind = "" if i < text_columns else ' class="num"'
            out.append(f"<{tag}{scope}{kind}>{cell}</{tag}>")
        return "<tr>" + "".join(out) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead>{cells("th", head)}</thead><tbody>{body}</tbody></table></div>'


def section(anchor: str, title: str, body: str, intro: str = "") -> str:
    lead = f'<p class="intro">{intro}</p>' if intro else ""
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>{lead}{body}</section>'


def absent(text: str) -> str:
    """A quiet note where a part of the report has nothing to show. `text` is HTML."""
    return f'<p class="absent">{text}</p>'


def document(kind: str, title: str, facts: str, contents: Sequence[tuple[str, str]], body: str) -> str:
    """A whole page. `contents`: (anchor, text) of the links on top; those whose section is not in `body` are left out."""
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in contents if f'id="{anchor}"' in body)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)} – Tandem</title><style>{CSS}</style></head><body><main>"
        f'<header><p class="over">{kind}</p><h1>{esc(title)}</h1><p class="facts">{esc(facts)}</p>'
        f"<nav>{links}</nav></header>{body}"
        "<footer>Drawn from the files on this disk; nothing was fetched, nothing was sent.</footer>"
        "</main></body></html>\n"
    )
