"""How a figure of a report looks, and how it becomes SVG for the page, SVG for a file and PNG.

On the page the colors are CSS variables, so a figure follows the reader's light or dark scheme; in files they are
the light ones. Matplotlib's pyplot is never imported: it keeps figures and picks a backend globally.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WIDTH, HEIGHT = 4.7, 3.1
"""Inches. On a telephone a point is then about a pixel."""

INK, MUTED, GRID, PAPER = "#1c2126", "#656d76", "#dde1e6", "#fefefe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c2649a", "#b98700", "#3a9bd0", "#7b5fc4", "#5b5f63")
"""After Okabe and Ito, "Color Universal Design" (2008), darkened where they would be pale on white."""

VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card",
    **{color: f"--s{n}" for n, color in enumerate(SERIES)},
}  # fmt: skip
"""The page's name of each color."""

DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"

_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5, "legend.fontsize": 9, "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.facecolor": "none", "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.frameon": False, "text.parse_math": False,
    "svg.fonttype": "none", "axes.formatter.limits": (-4, 6),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure: ``draw`` is given a matplotlib Figure."""

    name: str
    """Of its files."""
    caption: str
    draw: Callable[[Figure], None]
    height: float = HEIGHT


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure as text and bytes."""

    name: str
    caption: str
    inline: str
    """An ``<svg>`` element for a page, which brings no address, no script and no id of another figure."""
    svg: str
    png: bytes


def drawn(picture: Picture) -> Drawn:
    """Draw it once, write it three times; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": picture.name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        picture.draw(figure)
        text, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        figure.set_layout_engine("none")  # the places found for the first hold for the second
        figure.savefig(pixels, format="png", dpi=160, metadata={"Software": None})
    return Drawn(picture.name, picture.caption, _inline(text.getvalue(), picture), text.getvalue(), pixels.getvalue())


def _inline(svg: str, picture: Picture) -> str:
    """The SVG file as an element: no prolog, ids of its own, colors as variables, a width that follows the page."""
    svg = svg[svg.index("<svg") :]
    end = svg.index(">")
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", svg[:end]) + svg[end:]
    svg = svg.replace("xlink:href", "href").replace("<svg", '<svg role="img"', 1)
    svg = re.sub(r'\bid="', f'id="{picture.name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{picture.name}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"(font: [\d.]+px) [^;]*", r"\1 var(--font)", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", svg).strip()


def label(text: str, *, most: int = 44) -> str:
    """A text as matplotlib can show it: short, without control characters, not hidden by a leading underscore.

    >>> label("_hidden"), label("x" * 50, most=5)
    (' _hidden', 'xxxx…')
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def look(n: int) -> dict[str, Any]:
    """Color, dash and marker of series ``n``."""
    dash = DASHES[n // len(SERIES) % len(DASHES)]
    return {"color": SERIES[n % len(SERIES)], "linestyle": dash, "marker": MARKERS[n % len(MARKERS)]}


def legend(figure: Figure, axes: Any, *, most: int = 12) -> None:
    """Below the axes, never over the lines; one series needs none."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        wide = max(map(len, names)) > 22
        figure.legend(handles[:most], names[:most], loc="outside lower left", ncols=1 if wide else min(3, len(names)),
                      handlelength=1.6, columnspacing=1.2, labelspacing=0.3)  # fmt: skip


def percent(axis: Any) -> None:
    """Fractions as percents."""
    axis.set_major_formatter(lambda share, _position: f"{100 * share:g}")


def whole_ticks(axis: Any, count: int, *, most: int = 10) -> None:
    """Ticks at experiences: whole numbers from 0, at most about ``most``."""
    axis.set_ticks(range(0, count, max(1, math.ceil(count / most))))


def finite(values: Sequence[float]) -> list[float]:
    """Those that can be drawn."""
    return [value for value in values if math.isfinite(value)]
