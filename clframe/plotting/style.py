"""The style of every figure, and its rendering as SVG for the page, SVG for a file, PNG, and pixels.

On the page the colors are CSS variables, so that a figure follows the reader's light or dark scheme; in files they are
the light ones. Matplotlib's pyplot is never imported: it stores figures and selects a backend for the whole process.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    PixelArray = NDArray[np.uint8]
    """A picture as (height, width, 3)."""


WIDTH, HEIGHT = 4.7, 3.1
"""Inches. On a telephone a point is then about a pixel."""

INK, MUTED, GRID, PAPER = "#1c2126", "#656d76", "#dde1e6", "#fefefe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c2649a", "#b98700", "#3a9bd0", "#7b5fc4", "#5b5f63")
"""After Okabe and Ito, "Color Universal Design" (2008), darkened where they would be pale on white."""

VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card",
    **{color: f"--s{n}" for n, color in enumerate(SERIES)},
}  # fmt: skip
"""CSS variable of each color on the page."""

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
    """One figure: ``draw`` receives an empty matplotlib Figure."""

    name: str
    """Name of its files, without an ending."""
    caption: str
    draw: Callable[[Figure], None]
    height: float = HEIGHT


@dataclass(frozen=True, slots=True)
class RenderedPicture:
    """A figure as text and bytes."""

    name: str
    caption: str
    inline: str
    """An ``<svg>`` element for a page, without addresses, scripts and ids of another figure."""
    svg: str
    png: bytes


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """Apply the common style to everything that matplotlib creates; also a decorator."""
    import matplotlib

    style: dict[Any, Any] = {**_STYLE, **more}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def render_picture(picture: Picture) -> RenderedPicture:
    """Draw a figure once and render it as SVG and PNG; the same numbers give the same bytes."""
    from matplotlib.figure import Figure

    with styled(**{"svg.hashsalt": picture.name}):
        figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        picture.draw(figure)
        text, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        figure.set_layout_engine("none")  # the layout of the SVG also holds for the PNG
        figure.savefig(pixels, format="png", dpi=160, metadata={"Software": None})
    return RenderedPicture(
        picture.name, picture.caption, _inline(text.getvalue(), picture), text.getvalue(), pixels.getvalue()
    )


def render_pixels(figure: Figure) -> PixelArray:
    """Render a figure as an array (height, width, 3), for TensorBoard."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def encode_png(pixels: PixelArray) -> bytes:
    """Encode an array of pixels as the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _inline(svg: str, picture: Picture) -> str:
    """Return the SVG file as an element: no prolog, unique ids, colors as variables, a width that follows the page."""
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
    """Return a text as matplotlib can show it: short, without control characters, not hidden by a leading underscore.

    >>> label("_hidden"), label("x" * 50, most=5)
    (' _hidden', 'xxxx…')
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def series_style(n: int) -> dict[str, Any]:
    """Return color, dash and marker of series ``n``."""
    dash = DASHES[n // len(SERIES) % len(DASHES)]
    return {"color": SERIES[n % len(SERIES)], "linestyle": dash, "marker": MARKERS[n % len(MARKERS)]}


def shades() -> Colormap:
    """Return the color map of shares: the first series color, from transparent to full.

    Transparency instead of white, so that on the page a heat map follows the dark scheme too.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    color = to_rgb(SERIES[0])
    return LinearSegmentedColormap.from_list("shades", [(*color, 0.05), (*color, 1.0)])


def legend(figure: Figure, axes: Any, *, most: int = 12) -> None:
    """Add a legend below the axes, where it hides no line; every n-th entry where there are more than ``most``."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) < 2:
        return
    chosen = spaced_indices(len(names), most=most)
    handles, names = [handles[n] for n in chosen], [names[n] for n in chosen]
    columns = 1 if max(map(len, names)) > 22 else min(3, len(names))
    figure.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=1.6, columnspacing=1.2,
                  labelspacing=0.3)  # fmt: skip


def annotate_apart(figure: Figure, axes: Any, texts: Mapping[tuple[float, float], str], *, color: str) -> None:
    """Write a text next to each point so that no two overlap; call it when everything else is drawn.

    Each text takes the first free position around its point, nearest first.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground=PAPER)]  # texts may cross lines
    figure.draw_without_rendering()  # runs the layout, after which positions in pixels are known
    taken: list[Any] = []
    for point, text in texts.items():
        annotation: Any = None
        for distance, (right, up) in itertools.product((8, 20, 32, 44), _SIDES):
            if annotation is not None:
                annotation.remove()
            annotation = axes.annotate(
                text, point, xytext=(right * distance, up * distance), textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[right], va={1: "bottom", 0: "center", -1: "top"}[up],
                fontsize=8.5, color=color, path_effects=halo, zorder=5,
            )  # fmt: skip
            annotation.set_in_layout(False)  # else the layout would change under the positions just found
            box = annotation.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y1)
            if inside and axes.bbox.containsy(box.y0) and not any(box.overlaps(other) for other in taken):
                break
        taken.append(annotation.get_window_extent())


_SIDES = ((1, -1), (-1, 1), (1, 1), (-1, -1), (0, -1), (0, 1), (1, 0), (-1, 0))


def percent(axis: Any) -> None:
    """Label the ticks of an axis of fractions in percent."""
    axis.set_major_formatter(lambda share, _position: f"{100 * share:g}")


def counts(axis: Any) -> None:
    """Label the ticks of an axis of counts with k, M, G or T."""
    axis.set_major_formatter(lambda count, _position: short_count(count))


def short_count(value: float) -> str:
    """Format a count for the ticks of an axis.

    >>> short_count(0), short_count(350_000), short_count(1.8e9)
    ('0', '350 k', '1.8 G')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def integer_ticks(axis: Any, count: int, *, most: int = 10) -> None:
    """Place ticks at whole numbers from 0 to ``count - 1``, at most about ``most``."""
    axis.set_ticks(spaced_indices(count, most=most))


def spaced_indices(count: int, *, most: int) -> list[int]:
    """Return at most about ``most`` of 0 .. count - 1, evenly spaced from 0."""
    return list(range(0, count, max(1, math.ceil(count / most))))


def finite(values: Sequence[float]) -> list[float]:
    """Return the values that can be drawn."""
    return [value for value in values if math.isfinite(value)]
