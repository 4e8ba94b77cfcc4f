"""The page: one HTML file that asks for nothing else, runs no script, and follows light, dark, wide and narrow.

Every text goes through Jinja's escaping; only the figures' SVG, which we draw ourselves, is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clframe.reporting.report.drawing import SERIES, Drawn
from clframe.reporting.report.style import STYLE
from clframe.reporting.report.table import Cell, Quantity, Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page, under a heading of its own."""

    title: str
    intro: str = ""
    tiles: Sequence[tuple[str, Quantity, str]] = ()
    """Name, number and unit of what a reader looks for first."""
    pictures: Sequence[Drawn] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    """Tables that a reader opens."""
    facts: Sequence[tuple[str, str]] = ()
    commands: Sequence[str] = ()
    texts: Sequence[tuple[str, str]] = ()
    """Name and content of what is shown letter by letter, folded."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    made: str
    """By which version."""
    running: str = ""
    """What is still going on; the page then loads itself again."""
    notices: Sequence[str] = ()
    sections: Sequence[Section] = ()


def html(page: Page, *, reload_seconds: int = 5) -> str:
    """The page as HTML."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    colors = {f"--s{n}": color for n, color in enumerate(SERIES)}
    return environment.from_string(_PAGE).render(
        page=page, style=STYLE, colors=colors, reload_seconds=reload_seconds, kind=_kind
    )


def _kind(cell: Cell) -> str:
    """The class of a cell."""
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
{% else %}<td class="{{ kind(cell) }}">{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
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
{% for s in page.sections %}
<section>
<h2>{{ s.title }}</h2>
{% if s.intro %}<p class="intro">{{ s.intro }}</p>{% endif %}
{% if s.tiles %}
<dl class="tiles">
{% for name, value, unit in s.tiles %}
<div><dt>{{ name }}</dt><dd class="{{ kind(value) }}{{ " long" if value|string|length > 8 }}">{{ value }}\
{% if kind(value) == "number" %}<span> {{ unit }}</span>{% endif %}</dd></div>
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
<p class="intro">To repeat it:</p>
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
</section>
{% endfor %}
</main>
<footer><p>{{ page.made }}. The same tables are in <code>tables/</code> as CSV, Markdown and LaTeX, the figures in
<code>figures/</code> as SVG and PNG.</p></footer>
</body>
</html>
"""
