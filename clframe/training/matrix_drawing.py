"""The accuracy matrix as a picture and as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from clframe.metrics.continual import Matrix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST_WITH_DIGITS = 30
"""Experiences up to which the matrix's image has its numbers drawn in."""


def matrix_image(accuracy_TE: Matrix) -> NDArray[np.uint8]:
    """The accuracy matrix as a picture (height, width, 3): a heat map from 0 to 1 with percents drawn in."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # never pyplot, which keeps figures and picks a backend globally

    matrix_TE = np.asarray(accuracy_TE, dtype=float)
    rows, columns = matrix_TE.shape
    digits = columns <= LARGEST_WITH_DIGITS
    inch = 0.5 if digits else 15 / columns
    figure = Figure(figsize=(max(4.0, columns * inch + 2), max(2.5, rows * inch + 1.2)), dpi=100)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_invalid(matrix_TE), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="test experience", ylabel="after experience", title="accuracy in %")
    if digits:
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows))
        for (i, j), accuracy in np.ndenumerate(matrix_TE):
            text = "-" if np.isnan(accuracy) else f"{100 * accuracy:.0f}"
            dark = not np.isnan(accuracy) and accuracy < 0.6
            number = axes.text(j, i, text, ha="center", va="center", fontsize=11, color="white" if dark else "black")
            number.set_in_layout(False)  # inside the axes: measuring each would take longer than drawing it
    figure.tight_layout()
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def matrix_markdown(accuracy_TE: Matrix) -> str:
    """The accuracy matrix in percent as a Markdown table, numbers to copy; ``-`` where not evaluated.

    >>> print(matrix_markdown([[1.0, float("nan")], [0.5, 0.75]]))
    | after | 0 | 1 |
    |---|---|---|
    | **0** | 100.0 | - |
    | **1** | 50.0 | 75.0 |
    """
    columns = range(len(accuracy_TE[0]))
    lines = [f"| after | {' | '.join(str(j) for j in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i, row in enumerate(accuracy_TE):
        cells = ("-" if math.isnan(accuracy) else f"{100 * accuracy:.1f}" for accuracy in row)
        lines.append(f"| **{i}** | {' | '.join(cells)} |")
    return "\n".join(lines)
