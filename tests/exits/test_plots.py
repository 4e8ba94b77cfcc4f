"""Pictures of exits: sizes, what is drawn where, and the inputs that cannot be drawn."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from clframe.errors import ClframeError
from clframe.exits import ExitEvaluation
from clframe.exits.curves import AccuracyCostCurve, BudgetPoint, BudgetPoints, accuracy_cost_curve
from clframe.exits.plots import accuracy_cost_image, exit_accuracy_image, exit_usage_image
from clframe.plotting.images import heat_image, triangles_image
from clframe.plotting.style import PAPER, encode_png, shades
from clframe.plotting.style import SERIES as PALETTE

CURVE = AccuracyCostCurve(thresholds=(-math.inf, 0.5, math.inf), costs=(0.2, 0.6, 1.02), accuracies=(0.3, 0.6, 0.7),
              exit_costs=(0.2, 1.02), exit_accuracies=(0.3, 0.7))  # fmt: skip
POINTS = BudgetPoints(points=(
    BudgetPoint(name="50%", budget_share=0.5, threshold=0.4, cost=0.5, accuracy=0.5),
    BudgetPoint(name="10%", budget_share=0.1, undefined="dearer"),
))  # fmt: skip


def pixels(picture, color):
    """Number of pixels of exactly this color."""
    return int((picture == np.round(255 * np.array(to_rgb(color))).astype(np.uint8)).all(axis=2).sum())


def on_paper(color):
    """The pixel of a color with transparency on the figure's background."""
    *parts, alpha = color
    return [round(255 * (alpha * part + (1 - alpha) * under)) for part, under in zip(parts, to_rgb(PAPER), strict=True)]


def is_picture(picture):
    return picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


def test_every_curve_is_drawn_in_its_color():
    one, two = accuracy_cost_image({"a": CURVE}), accuracy_cost_image({"a": CURVE, "b": CURVE})
    assert is_picture(one)
    assert pixels(one, PALETTE[0]) > 150
    assert pixels(one, PALETTE[1]) == 0
    assert pixels(two, PALETTE[1]) > 150


def test_points_add_rings_and_what_is_undefined_adds_nothing():
    bare = accuracy_cost_image({"a": CURVE})
    assert pixels(accuracy_cost_image({"a": CURVE}, points={"a": POINTS}), PALETTE[0]) > pixels(bare, PALETTE[0])
    nothing = BudgetPoints(points=POINTS.points[1:])
    for given in (nothing, BudgetPoints(points=None, undefined="no validation samples")):
        assert np.array_equal(accuracy_cost_image({"a": CURVE}, points={"a": given}), bare)


def test_more_curves_than_colors_can_be_drawn():
    assert is_picture(accuracy_cost_image({f"after {n}": CURVE for n in range(len(PALETTE) + 1)}))


def test_one_exit_and_one_sample_can_be_drawn():
    answers = ExitEvaluation(confidence_KN=torch.ones(1, 1), correct_KN=torch.ones(1, 1), cost_K=(5,))
    assert is_picture(accuracy_cost_image({"only": accuracy_cost_curve(answers, backbone_cost=5)}))
    assert is_picture(exit_accuracy_image([[1.0]], names=["final"]))
    assert is_picture(exit_usage_image([[1.0]], names=["final"]))
    assert is_picture(heat_image([[1.0]], rows=["final"], columns=["0"], title="similarity"))


def test_accuracy_of_each_exit_has_a_line_each_and_gaps():
    full = exit_accuracy_image([[0.5, 0.9], [0.4, 0.8], [0.3, 0.7]], names=["layer1", "final"])
    gap = exit_accuracy_image([[0.5, 0.9], [0.4, math.nan], [0.3, 0.7]], names=["layer1", "final"])
    assert pixels(full, PALETTE[0]) > 150
    assert 0 < pixels(gap, PALETTE[1]) < pixels(full, PALETTE[1]) / 2


def test_bars_cover_the_share_of_each_exit():
    picture = exit_usage_image([[0.25, 0.75]], names=["first", "final"])
    first, last = (on_paper(shades()(share)) for share in (0.5, 1.0))
    areas = [int((np.abs(picture.astype(int) - color).max(axis=2) <= 2).sum()) for color in (first, last)]
    assert areas[1] / areas[0] == pytest.approx(3.0, rel=0.1)
    empty = exit_usage_image([[math.nan, math.nan], [0.25, 0.75]], names=["first", "final"], labels=["25%", "50%"])
    assert is_picture(empty)


def test_heat_maps_grow_with_their_table_and_show_what_is_undefined():
    small = heat_image([[0.5]], rows=["a"], columns=["0"], title="t")
    large = heat_image([[0.5] * 12] * 9, rows=list("abcdefghi"), columns=[str(n) for n in range(12)], title="t")
    assert large.shape[0] > small.shape[0]
    assert large.shape[1] > small.shape[1]
    undefined = heat_image([[math.nan]], rows=["a"], columns=["0"], title="t")
    assert pixels(undefined, PAPER) > pixels(small, PAPER) + 1000


def test_figures_of_long_streams_stop_growing():
    long = heat_image([[0.5] * 200] * 90, rows=[f"{n}" for n in range(90)], columns=[f"{n}" for n in range(200)], title="t")
    assert long.shape[0] <= 1200
    assert long.shape[1] <= 2000
    assert exit_usage_image([[0.5, 0.5]] * 200, names=["a", "b"]).shape[1] <= 1400
    assert triangles_image({"a": [[0.5] * 120] * 120, "b": [[0.5] * 120] * 120}).shape[1] <= 1400


def test_triangles_have_experiences_down_and_time_across():
    def cells(picture):
        """Median color of the lower left and of the upper right cell of two."""
        height, width, _ = picture.shape
        rows, columns = (height // 4, 2 * height // 3), (width // 4, 3 * width // 4)
        return [tuple(np.median(picture[rows[r] : rows[r] + 20, columns[c] : columns[c] + 20].reshape(-1, 3), axis=0)) for r, c in ((1, 0), (0, 1))]

    before, after = cells(triangles_image({"only": [[1.0], [0.0, 1.0]]}))
    assert before == tuple(on_paper((0, 0, 0, 0)))  # experience 1 before it was learned
    assert after == pytest.approx(on_paper(shades()(0.0)), abs=1)  # experience 0 after it: the pale end
    one, two = triangles_image({"a": [[1.0]]}), triangles_image({"a": [[1.0]], "b": [[0.5]]})
    assert two.shape[1] == 2 * one.shape[1]


def test_png_holds_the_picture():
    picture = accuracy_cost_image({"a": CURVE})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)


@pytest.mark.parametrize("draw", [
    lambda: accuracy_cost_image({}),
    lambda: triangles_image({}),
    lambda: exit_accuracy_image([], names=["a"]),
    lambda: exit_accuracy_image([[0.5]], names=["a", "b"]),
    lambda: exit_usage_image([[0.5, 0.5], [1.0]], names=["a", "b"]),
    lambda: heat_image([[0.5]], rows=["a", "b"], columns=["0"], title="t"),
])  # fmt: skip
def test_what_cannot_be_drawn(draw):
    with pytest.raises(ClframeError, match="give"):
        draw()


@pytest.mark.slow  # tests/training/test_tensorboard.py looks at the same in this process
def test_pyplot_is_never_imported():
    # Avalanche imports it with the package; taken away again, it stays away unless we import it.
    code = ("import sys, matplotlib, clframe.training; "
            "sys.modules.pop('matplotlib.pyplot', None); vars(matplotlib).pop('pyplot', None); "
            "from clframe.plotting.images import heat_image; "
            "heat_image([[1.0]], rows=['a'], columns=['0'], title='t'); "
            "sys.exit('matplotlib.pyplot' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
