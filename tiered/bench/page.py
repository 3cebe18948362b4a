"""A benchmark as one web page that needs nothing besides itself: facts, pictures, the table, and Markdown to paste.

In: a `Result`, and the bytes of its picture. Out: HTML; pictures are inside it. An issue takes the Markdown that the
page ends with.
"""

import base64
from html import escape
from typing import Final

from tiered.bench.output import LEGEND, Result, markdown, table

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1180px; margin: 2em auto;
  padding: 0 1.5em; }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 1.8em 0 .5em }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.2em } dt { color: #5b6875 } dd { margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #e1e6eb }
th { color: #5b6875; font-weight: 600 } .text { text-align: left } tr.both td { border-bottom-color: #9aa7b3 }
img { width: 100%; height: auto } code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f4f6f8 }
pre { padding: .8em; overflow-x: auto } .note { color: #a3372f; font-weight: 600 } small { color: #5b6875 }
"""
_TEXTS: Final = ("model", "backend", "test", "bound by")


def page(result: Result, picture: bytes | None) -> str:
    """The page; `picture` is PNG."""
    title = " and ".join(store.model for store in result.stores)
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{_code(text) if name == 'command' else escape(text)}</dd>"
        for name, text in result.facts().items()
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in result.notes)
    body = [f"<h1>tiered bench: {escape(title)}</h1>", f"<dl>{facts}</dl>", notes]
    if picture is not None:
        encoded = base64.b64encode(picture).decode("ascii")
        told = "tokens per second beside what was possible, and who waited for whom"
        body.append(f'<h2>Pictures</h2><img alt="{told}" src="data:image/png;base64,{encoded}">')
    if result.rows:
        body.append(f'<h2>Table</h2><div class="wide">{_table(result)}</div><p><small>{escape(LEGEND)}</small></p>')
    body.append(f"<h2>For an issue</h2><pre>{escape(markdown(result))}</pre>")
    head = f'<meta charset="utf-8"><title>tiered bench: {escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(result: Result) -> str:
    titles, cells = table(result.rows)
    kinds = [' class="text"' if title in _TEXTS else "" for title in titles]

    def line(values: list[str], tag: str) -> str:
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    lines = [f"<tr>{line(titles, 'th')}</tr>"]
    for row, values in zip(result.rows, cells, strict=True):
        lines.append(f'<tr class="{row.phase}">{line(values, "td")}</tr>')
    return f"<table>{''.join(lines)}</table>"
