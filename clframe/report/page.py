"""The HTML page: style sheet, sections, template. Series colors come from :mod:`clframe.plotting.style`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from clframe.plotting.style import SERIES, RenderedPicture
from clframe.printable import printable
from clframe.tables import Cell, Quantity, Table

STYLE = """\
:root {
  --ink: #1c2126; --muted: #5c646d; --grid: #dde1e6; --card: #ffffff; --page: #f5f6f8; --line: #e1e4e8;
  --note: #fff6e0; --note-line: #d9a400; --run: #e6f3ff; --run-line: #0072b2; --accent: #0072b2;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7eaee; --muted: #a2abb5; --grid: #31373f; --card: #191d22; --page: #0f1215; --line: #2a3037;
    --note: #2d260f; --note-line: #d9a400; --run: #0d2537; --run-line: #4fb0ee; --accent: #63b8f0;
    --s0: #4fb0ee; --s1: #ff8a4c; --s2: #2fc79a; --s3: #e58fc2; --s4: #e2b43a;
    --s5: #8ad0f7; --s6: #ab94ee; --s7: #b4b9be;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); overflow-wrap: anywhere; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 30px; padding-bottom: 6px; }
h1 { margin: 0; font-size: 27px; line-height: 1.2; letter-spacing: -0.01em; }
header p { margin: 6px 0 0; color: var(--muted); }
h2, h3 { margin: 34px 0 4px; font-size: 19px; line-height: 1.3; }
h3 { font-size: 17px; }
nav { margin: 16px 0 0; padding: 10px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font-size: 14px; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li { display: block; margin: 2px 0; }
nav li.sub { display: inline; margin-left: 1.4em; font-size: 13px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.intro { margin: 0 0 12px; color: var(--muted); }
.notice { margin: 14px 0 0; padding: 10px 14px; background: var(--note); border-left: 4px solid var(--note-line);
  border-radius: 6px; }
.notice.running { background: var(--run); border-color: var(--run-line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 12px 0 16px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tiles dt { color: var(--muted); font-size: 13px; line-height: 1.35; }
.tiles dd { margin: 4px 0 0; font-size: 22px; font-weight: 620; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles dd.long { font-size: 16px; line-height: 1.6; }
.tiles dd span { font-size: 14px; font-weight: 400; color: var(--muted); }
.tiles dd.undefined { font-size: 14px; font-weight: 400; color: var(--muted); }
.figures { display: grid; gap: 14px; margin: 12px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(345px, 100%), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 12px 8px; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.4; margin: 0 2px 8px; }
figure svg { display: block; width: 100%; height: auto; max-width: 520px; margin: 0 auto; }
.tables { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); }
.table { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow-x: auto; margin: 0 0 2px; container-type: inline-size; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 12px 14px 6px; font-weight: 620; }
/* As wide as the visible part of a table that scrolls. */
caption small { display: block; font-weight: 400; font-size: 13px; color: var(--muted); line-height: 1.4;
  position: sticky; left: 14px; max-width: calc(100cqw - 28px); }
th, td { padding: 6px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: normal; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; border-top: 0; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 9em; }
td.number { white-space: nowrap; }
td.undefined { color: var(--muted); font-style: italic; }
tbody tr:hover { background: color-mix(in srgb, var(--accent) 7%, transparent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; overflow-x: auto;
  font-size: 13px; line-height: 1.5; margin: 0 0 14px; overflow-wrap: normal; }
code { font-size: 0.92em; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 12px 0; }
summary { cursor: pointer; padding: 10px 14px; font-weight: 500; }
summary:focus-visible { outline: 2px solid var(--accent); border-radius: 10px; }
details .table, details pre { border-width: 1px 0 0; border-radius: 0 0 10px 10px; margin: 0; }
nav details, details.chapter { background: none; border: 0; margin: 0; }
nav summary { padding: 0; }
details.chapter { border-top: 1px solid var(--line); margin-top: 26px; }
details.chapter > summary { padding: 14px 0 10px; }
details.chapter > summary h2 { display: inline; margin: 0; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; margin: 0 0 14px; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; }
footer { margin-top: 30px; padding-bottom: 30px; color: var(--muted); font-size: 13px; }
@media (max-width: 520px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  h1 { font-size: 22px; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dd { margin-bottom: 8px; }
  th, td { padding: 6px 10px; }
  tbody th { min-width: 6.5em; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .tiles dd { font-size: 19px; }
}
@media print {
  body { background: none; }
  nav { display: none; }
  section { break-inside: auto; }
  figure, .table { break-inside: avoid; }
}
"""


Fold = Literal["never", "open", "closed"]

MOST_LISTED: Final = 40
"""Sections up to which the list of contents is not collapsed at first."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page under a heading."""

    title: str
    short: str = ""
    """Title in the table of contents; empty for the title itself."""
    level: int = 1
    """Level in the table of contents; a section of level 2 belongs to the one of level 1 before it."""
    fold: Fold = "never"
    """Whether the section can be collapsed, together with those of level 2 after it, and how it is at first."""
    intro: str = ""
    tiles: Sequence[tuple[str, Quantity, str]] = ()
    """Name, value and unit of the headline numbers."""
    pictures: Sequence[RenderedPicture] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    """Tables that are collapsed at first."""
    facts: Sequence[tuple[str, str]] = ()
    commands: Sequence[str] = ()
    texts: Sequence[tuple[str, str]] = ()
    """Name and content of preformatted texts, collapsed at first."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    made: str
    """Version of clframe that wrote it."""
    running: str = ""
    """Runs in progress; the page then reloads by itself."""
    notices: Sequence[str] = ()
    sections: Sequence[Section] = ()


def render_page(page: Page, *, reload_seconds: int = 5) -> str:
    """Render the page as HTML."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalize)
    chapters: list[list[tuple[int, Section]]] = []
    for n, section in enumerate(page.sections, start=1):
        if section.level == 1 or not chapters:
            chapters.append([])
        chapters[-1].append((n, section))
    colors = {f"--s{n}": color for n, color in enumerate(SERIES)}
    return environment.from_string(_PAGE).render(
        page=page, chapters=chapters, style=STYLE, colors=colors, reload_seconds=reload_seconds, css_class=_css_class,
        long=len(page.sections) > MOST_LISTED,
    )  # fmt: skip


def _finalize(value: object) -> object:
    """Make texts printable before they are escaped; markup of the page and its figures is of type Markup."""
    return printable(value, lines=True) if type(value) is str else value


def _css_class(cell: Cell) -> str:
    if not isinstance(cell, Quantity):
        return "text"
    return "undefined" if math.isnan(cell.value) else "number"


_PAGE = """\
{% macro table(t) %}
<div class="table"><table>
<caption>{{ t.title }}{% if t.note %}<small>{{ t.note }}</small>{% endif %}</caption>
<thead><tr>{% for c in t.columns %}<th scope="col">{{ c }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in t.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>\
{% else %}<td class="{{ css_class(cell) }}">{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% macro body(s) %}
{% if s.intro %}<p class="intro">{{ s.intro }}</p>{% endif %}
{% if s.tiles %}
<dl class="tiles">
{% for name, value, unit in s.tiles %}
<div><dt>{{ name }}</dt><dd class="{{ css_class(value) }}{{ " long" if value|string|length > 8 }}">{{ value }}\
{% if css_class(value) == "number" %}<span> {{ unit }}</span>{% endif %}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if s.pictures %}
<div class="figures">
{% for p in s.pictures %}
<figure>
<figcaption>{{ p.caption }}</figcaption>
{{ p.inline|safe }}
</figure>
{% endfor %}
</div>
{% endif %}
{% if s.tables %}
<div class="tables">
{% for t in s.tables %}{{ table(t) }}{% endfor %}
</div>
{% endif %}
{% if s.commands %}
<p class="intro">Commands:</p>
<pre>{% for c in s.commands %}{{ c }}
{% endfor %}</pre>
{% endif %}
{% if s.facts %}
<dl class="facts">
{% for name, text in s.facts %}
<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
{% endif %}
{% for t in s.folded %}
<details><summary>{{ t.title }}</summary>{{ table(t) }}</details>
{% endfor %}
{% for name, text in s.texts %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{% if page.running %}
<meta http-equiv="refresh" content="{{ reload_seconds }}">
{% endif %}
<link rel="icon" href="data:,">
<title>{{ page.title }}</title>
<style>
:root { {% for name, color in colors.items() %}{{ name }}: {{ color }}; {% endfor %}}
{{ style|safe }}
</style>
</head>
<body>
<header>
<h1>{{ page.title }}</h1>
<p>{{ page.subtitle }}</p>
</header>
<main>
{% if page.running %}
<p class="notice running" role="status"><b>Running.</b> {{ page.running }}</p>
{% endif %}
{% for notice in page.notices %}
<p class="notice" role="alert"><b>Note.</b> {{ notice }}</p>
{% endfor %}
{% if page.sections|length > 1 %}
<nav aria-label="Contents">
<details{{ "" if long else " open" }}><summary>Contents</summary>
<ul>
{% for chapter in chapters %}
{% for n, s in chapter %}
<li{% if s.level > 1 %} class="sub"{% endif %}><a href="#section-{{ n }}">{{ s.short or s.title }}</a></li>
{% endfor %}
{% endfor %}
</ul>
</details>
</nav>
{% endif %}
{% for chapter in chapters %}
{% if chapter[0][1].fold == "never" %}
{% for n, s in chapter %}
<section id="section-{{ n }}">
<h2>{{ s.title }}</h2>
{{ body(s) }}
</section>
{% endfor %}
{% else %}
<details class="chapter" id="section-{{ chapter[0][0] }}"{{ " open" if chapter[0][1].fold == "open" else "" }}>
<summary><h2>{{ chapter[0][1].title }}</h2></summary>
{{ body(chapter[0][1]) }}
{% for n, s in chapter[1:] %}
<section id="section-{{ n }}">
<h3>{{ s.title }}</h3>
{{ body(s) }}
</section>
{% endfor %}
</details>
{% endif %}
{% endfor %}
</main>
<footer><p>{{ page.made }}. The same tables are in <code>tables/</code> as CSV, Markdown and LaTeX, the figures in
<code>figures/</code> as SVG and PNG.</p></footer>
</body>
</html>
"""
