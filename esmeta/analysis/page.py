"""One self-contained HTML page: no script, no link, images inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_KINDS = {".png": "image/png", ".gif": "image/gif"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #888; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.mean td { border-top: 1px solid #ccc; font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; }
figcaption, .note { color: #666; font-size: 0.9rem; }
.wide { overflow-x: auto; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
"""


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph of plain text; ``note`` sets it small and grey."""
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table with its heading in the first row; a row that begins with ``mean`` is set apart."""

    def line(cells: Iterable[str], kind: str) -> str:
        return "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells)

    means = {"mean": ' class="mean"'}
    body = "\n".join(f"<tr{means.get(row[0], '')}>{line(row, 'td')}</tr>" for row in rows[1:])
    return (
        f'<div class="wide"><table>\n<thead><tr>{line(rows[0], "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def image(path: Path, caption: str) -> str:
    """A PNG or GIF with its caption, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    kind = _KINDS[path.suffix]
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:{kind};base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def folded(title: str, text: str) -> str:
    """Preformatted text behind a title that opens it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
