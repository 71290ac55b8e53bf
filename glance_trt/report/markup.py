"""HTML that is made by `tag` alone, which escapes every text that is not markup of its own making."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Markup, which `tag` does not escape."""


def tag(name: str, /, *content: str, **attributes: str) -> Html:
    """An element. Attributes are written as in Python: ``class_``, ``aria_hidden``."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    start = f"<{name}" + "".join(f' {key}="{_escape(value)}"' for key, value in pairs) + ">"
    if name in ("meta", "img"):  # have no end
        return Html(start)
    inner = "".join(part if isinstance(part, Html) else _escape(part) for part in content)
    return Html(f"{start}{inner}</{name}>" + "\n" * (name in ("head", "section", "figure", "table", "tr", "p")))


def _escape(text: str) -> str:
    """For content and attributes; without control characters, some of which reorder the text around them."""
    return html.escape("".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str, caption: str = "") -> Html:
    """`align`: l or r for each column. The first column heads the rows."""
    body = []
    for first, *others in rows:
        cells = [tag("td", cell, class_=side) for cell, side in zip(others, align[1:], strict=True)]
        body.append(tag("tr", tag("th", first, scope="row", class_=align[0]), *cells))
    titles = [tag("th", cell, scope="col", class_=side) for cell, side in zip(head, align, strict=True)]
    parts = (tag("thead", tag("tr", *titles)), tag("tbody", *body))
    return tag("div", tag("table", *([tag("caption", caption)] if caption else []), *parts), class_="scroll")


def bar(text: str, share: float) -> Html:
    """`text` beside a bar that is full at 1, and marked beyond it or where the share is no number."""
    within = 0 <= share <= 1
    width = f"width:{100 * share if within else 100:.1f}%"
    fill = tag("span", style=width, class_="fill" if within else "fill over")
    return tag("span", text, tag("span", fill, class_="bar"))


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

CSS = Html("""
:root { color-scheme: light dark; --text: #1a1d21; --quiet: #5c646e; --line: #d6dae0; --page: #fff; --over: #b3261e;
  --p0: #0063b2; --p1: #b8500a; --p2: #00775a }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --quiet: #9ca5b0; --line: #3a4049; --page: #15181c;
  --over: #ff8a80; --p0: #62b5f5; --p1: #f5a04c; --p2: #3fc79a } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 15px/1.45 system-ui, sans-serif;
  color: var(--text); background: var(--page); overflow-wrap: anywhere }
h1 { margin: .5rem 0 } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem } h3 { margin: 1rem 0 .4rem; font-size: 1rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem } dd, figure { margin: 0 }
dt, small, figcaption, caption, thead { color: var(--quiet) } small { display: block } summary { cursor: pointer }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400 }
caption { padding-top: .4rem; text-align: left } thead th, caption { font-weight: 600 }
.r { text-align: right; white-space: nowrap }
.scroll { overflow-x: auto; max-width: 100% } .beside { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem }
.bar { display: inline-block; width: 8rem; height: .7rem; margin-left: .7rem; background: var(--line) }
.fill { display: block; height: 100%; background: var(--p0) } .over { background: var(--over) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem } img { max-width: 100% }
.drawing { flex: 1 1 34rem; min-width: 0 } .drawing .scroll svg { min-width: 34rem; width: 100% }
.key { white-space: nowrap; margin-right: 1rem }
.key svg { width: 1em; height: 1em; margin-right: .35em; vertical-align: -.12em }
.p0 { --phase: var(--p0) } .p1 { --phase: var(--p1) } .p2 { --phase: var(--p2) }
path { stroke: var(--phase); fill: var(--phase); stroke-width: 1.6 } path.p1 { fill: var(--page) }
path.arc { fill: none } .arc.p1 { stroke-dasharray: 5 3 } .arc.p2 { stroke-dasharray: 1.5 3 }
path.axis { stroke: var(--quiet); stroke-width: 1 } path.beyond { stroke-dasharray: 2 3 }
text { font-size: 12px; fill: var(--text); text-anchor: middle }
""")
