"""An HTML page that needs nothing but itself: light and dark, narrow and wide, with a table to search and to sort.

It holds no address of anything, and its policy forbids it to load or run what is not in it. The caller escapes what it
puts into a section.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_page", "html_table"]


def html_page(title: str, head: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page with a heading, links to its sections, and the sections; those without content are left out.

    Args:
        title: Plain text.
        head: HTML below the heading.
        sections: (name as plain text, content as HTML). A table with the id "rows" is sorted by its column
            heads, which hold a button each, and searched by an input "search", which counts into "count".

    >>> page = html_page("Run <1>", "", [("Plan", "<p>all</p>"), ("Loss", "")])
    >>> "<h1>Run &lt;1&gt;</h1>" in page, "#plan" in page, "#loss" in page
    (True, True, False)
    """
    shown = [(name, _anchor(name), content) for name, content in sections if content]
    body = [f"<header><h1>{escape(title)}</h1>{head}</header><nav aria-label='Sections'>"]
    body += [f"<a href='#{anchor}'>{escape(name)}</a>" for name, anchor, _ in shown]
    body.append("</nav><main>")
    body += [f"<section id='{anchor}'><h2>{escape(name)}</h2>{content}</section>" for name, anchor, content in shown]
    body.append("</main>")
    page = PAGE.format(policy=_policy(), title=escape(title), style=STYLE, body="\n".join(body), script=SCRIPT)
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON may hold, is no UTF-8


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts; on a narrow screen each row becomes a list.

    >>> "<td data-label='name'>a &amp; b</td>" in html_table(["name"], [["a & b"]])
    True
    """
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in columns)
    body = []
    for row in rows:
        cells = zip(columns, row, strict=True)
        body.append("".join(f"<td data-label='{escape(name)}'>{escape(cell)}</td>" for name, cell in cells))
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _policy() -> str:
    """Nothing is loaded, and no script but the page's own runs: even text that were not escaped could do nothing."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )


SCRIPT = """
"use strict";
const table = document.getElementById("rows");
if (table) {
  const box = document.getElementById("search"), count = document.getElementById("count"), body = table.tBodies[0];
  const rows = [...body.rows].map(row => ({row, text: row.textContent.toLowerCase()}));
  const search = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const {row, text} of rows) {
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  box.addEventListener("input", search);
  [...table.tHead.rows[0].cells].forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.ariaSort === "ascending", value = entry => entry.row.cells[column].textContent;
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    head.ariaSort = down ? "descending" : "ascending";
    const compare = new Intl.Collator("en", {numeric: true}).compare;
    const number = text => text.trim() === "" ? NaN : Number(text);
    rows.sort((a, b) => {
      const x = number(value(a)), y = number(value(b));
      const order = Number.isNaN(x) || Number.isNaN(y) ? compare(value(a), value(b)) : x - y;
      return down ? -order : order;
    });
    body.append(...rows.map(entry => entry.row));
  }));
  const asked = new URLSearchParams(location.hash.slice(1)).get("q");
  if (asked) {
    box.value = asked;
    box.scrollIntoView();
  }
  search();
}
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f8; --ink: #1a1c1e; --soft: #5a6068; --rule: #d9dce0;
  --s0: #1a1c1e; --s1: #c2500a; --s2: #0b6cae; --s3: #00795a; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1f2226; --ink: #e6e8ea; --soft: #a0a7af;
  --rule: #383d43; --s0: #e6e8ea; --s1: #f0914d; --s2: #6cb6f0; --s3: #4fc9a4; --link: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--rule); padding-bottom: .25rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; }
a { color: var(--link); }
code { font: .85em ui-monospace, monospace; }
.small { color: var(--soft); font-size: .875rem; margin: .4rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: .4rem; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; }
.tiles span { color: var(--soft); font-size: .875rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.chart { width: 100%; max-width: 33rem; height: auto; display: block; margin: .5rem 0; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.chart .tick, .chart .axis, .chart .note { fill: var(--soft); }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart .line { fill: none; stroke-width: 2; }
.chart .band { fill: var(--rule); opacity: .5; }
.chart .bar { fill: var(--s2); }
.chart .s0 { stroke: var(--s0); } .chart .s1 { stroke: var(--s1); }
.chart .s2 { stroke: var(--s2); } .chart .s3 { stroke: var(--s3); }
.chart .mark { stroke: var(--page); stroke-width: 1; }
.chart .mark.s0 { fill: var(--s0); } .chart .mark.s1 { fill: var(--s1); }
.chart .mark.s2 { fill: var(--s2); } .chart .mark.s3 { fill: var(--s3); }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, a:focus-visible, input:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
#rows td { min-width: 3rem; }
#rows td[data-label=review] { min-width: 20rem; }
#rows td[data-label=reference], #rows td[data-label=before], #rows td[data-label=after] {
  min-width: 11rem; }
tr[hidden] { display: none !important; }
.search input { font: inherit; width: min(24rem, 100%); padding: .3rem .5rem; color: inherit; background: var(--card);
  border: 1px solid var(--soft); border-radius: .3rem; }
#count { color: var(--soft); }
.sample { background: var(--card); border: 1px solid var(--rule); border-radius: .4rem; padding: .6rem .8rem;
  margin: .75rem 0; display: grid; grid-template-columns: 5.5rem 1fr; gap: .3rem .75rem; }
.sample dt { color: var(--soft); } .sample dd { margin: 0; }
@media (max-width: 40rem) {
  .chart text { font-size: 14px; }
  .sample { grid-template-columns: 1fr; gap: 0; } .sample dd { margin-bottom: .4rem; }
  .wide thead { display: none; }
  .wide table, .wide tbody, .wide tr, .wide td { display: block; width: 100%; }
  .wide tr { border-bottom: 1px solid var(--rule); padding: .4rem 0; }
  .wide td { border: 0; padding: .1rem 0; min-width: 0 !important; display: grid;
    grid-template-columns: 7rem 1fr; gap: .5rem; }
  .wide td:empty { display: none; }
  .wide td::before { content: attr(data-label); color: var(--soft); }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
