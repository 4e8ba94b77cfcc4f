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
PNG_DPI = 160
"""Pixels per inch of PNG files."""

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
    """Draw a figure once and render it as SVG and PNG; the same numbers give the same bytes.

    The canvases are called directly: ``savefig`` draws every figure twice, the first time without output.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with styled(**{"svg.hashsalt": picture.name}):
        figure = Figure(figsize=(WIDTH, picture.height), dpi=72, layout="constrained")
        picture.draw(figure)
        text, pixels = io.StringIO(), io.BytesIO()
        vectors: Any = FigureCanvasSVG(figure)
        vectors.print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        figure.set_layout_engine("none")  # the layout of the SVG also holds for the PNG
        figure.dpi = PNG_DPI
        raster: Any = FigureCanvasAgg(figure)
        raster.print_png(pixels, metadata={"Software": None})
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
    """Return color, dash and marker of series ``n``: where colors repeat, dashes and markers are others."""
    color, lap = n % len(SERIES), n // len(SERIES)
    return {
        "color": SERIES[color], "linestyle": DASHES[lap % len(DASHES)], "marker": MARKERS[(color + lap) % len(MARKERS)]
    }  # fmt: skip


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

    Each text takes the first position around its point, nearest first, that covers no other text of the axes and none
    of the points; where there is none, the position that covers least.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground=PAPER)]  # texts may cross lines
    figure.draw_without_rendering()  # runs the layout, after which positions in pixels are known
    pixels = figure.dpi / 72
    taken = [text.get_window_extent() for text in axes.texts]
    taken += [_around(axes.transData.transform(point), 5 * pixels) for point in texts]
    for point, text in texts.items():
        annotation = axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=color,
                                   path_effects=halo, zorder=5)  # fmt: skip
        annotation.set_in_layout(False)  # else the layout would change under the positions just found
        x, y = axes.transData.transform(point)
        size = annotation.get_window_extent()
        best: tuple[float, Any, tuple[int, int, int]] | None = None
        for distance, (right, up) in itertools.product((8, 20, 32, 44, 60, 80), _SIDES):
            box = _moved(size, x + right * distance * pixels, y + up * distance * pixels, right, up)
            covered = sum(_common_area(box, other) for other in taken) + _area(box) - _common_area(box, axes.bbox)
            if best is None or covered < best[0]:
                best = covered, box, (distance, right, up)
            if covered <= 0:
                break
        assert best is not None
        _, box, (distance, right, up) = best
        annotation.set(position=(right * distance, up * distance), ha=_ALIGNED[right], va=_RAISED[up])
        taken.append(box)


def _around(center: Any, radius: float) -> Any:
    from matplotlib.transforms import Bbox

    x, y = center
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _moved(size: Any, x: float, y: float, right: int, up: int) -> Any:
    """Return the box of a text aligned at a point: to the right of it for 1, centered for 0, to the left for -1."""
    from matplotlib.transforms import Bbox

    left, low = x + (right - 1) * size.width / 2, y + (up - 1) * size.height / 2
    return Bbox.from_bounds(left, low, size.width, size.height)


def _area(box: Any) -> float:
    return float(box.width * box.height)


def _common_area(first: Any, second: Any) -> float:
    wide = min(first.x1, second.x1) - max(first.x0, second.x0)
    high = min(first.y1, second.y1) - max(first.y0, second.y0)
    return float(wide * high) if wide > 0 and high > 0 else 0.0


_ALIGNED = {1: "left", 0: "center", -1: "right"}
_RAISED = {1: "bottom", 0: "center", -1: "top"}
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
