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
from clframe.exits import ExitAnswers
from clframe.exits.curves import BudgetPoint, BudgetPoints, Curve, accuracy_cost_curve
from clframe.exits.plots import curve_image, exit_accuracy_image, who_answers_image
from clframe.plotting.images import PALETTE, heat_image, png, triangles_image

CURVE = Curve(thresholds=(-math.inf, 0.5, math.inf), costs=(0.2, 0.6, 1.02), accuracies=(0.3, 0.6, 0.7),
              exit_costs=(0.2, 1.02), exit_accuracies=(0.3, 0.7))  # fmt: skip
POINTS = BudgetPoints(points=(
    BudgetPoint(name="50%", asked_cost=0.5, threshold=0.4, cost=0.5, accuracy=0.5),
    BudgetPoint(name="10%", asked_cost=0.1, undefined="dearer"),
))  # fmt: skip


def pixels(picture, color):
    """How many pixels have exactly this color."""
    return int((picture == np.round(255 * np.array(to_rgb(color))).astype(np.uint8)).all(axis=2).sum())


def is_picture(picture):
    return picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


def test_every_curve_is_drawn_in_its_color():
    one, two = curve_image({"a": CURVE}), curve_image({"a": CURVE, "b": CURVE})
    assert is_picture(one)
    assert pixels(one, PALETTE[0]) > 300
    assert pixels(one, PALETTE[1]) == 0
    assert pixels(two, PALETTE[1]) > 300


def test_points_add_rings_and_what_is_undefined_adds_nothing():
    bare = curve_image({"a": CURVE})
    assert pixels(curve_image({"a": CURVE}, points={"a": POINTS}), PALETTE[0]) > pixels(bare, PALETTE[0])
    nothing = BudgetPoints(points=POINTS.points[1:])
    for given in (nothing, BudgetPoints(points=None, undefined="no validation samples")):
        assert np.array_equal(curve_image({"a": CURVE}, points={"a": given}), bare)


def test_more_curves_than_colors_run_along_a_map():
    picture = curve_image({f"after {n}": CURVE for n in range(len(PALETTE) + 1)})
    assert is_picture(picture)
    assert pixels(picture, PALETTE[1]) == 0


def test_one_exit_and_one_sample_can_be_drawn():
    answers = ExitAnswers(confidence_KN=torch.ones(1, 1), correct_KN=torch.ones(1, 1), cost_K=(5,))
    assert is_picture(curve_image({"only": accuracy_cost_curve(answers, backbone_cost=5)}))
    assert is_picture(exit_accuracy_image([[1.0]], names=["final"]))
    assert is_picture(who_answers_image([[1.0]], names=["final"]))
    assert is_picture(heat_image([[1.0]], rows=["final"], columns=["0"], title="similarity"))


def test_accuracy_of_each_exit_has_a_line_each_and_gaps():
    full = exit_accuracy_image([[0.5, 0.9], [0.4, 0.8], [0.3, 0.7]], names=["layer1", "final"])
    gap = exit_accuracy_image([[0.5, 0.9], [0.4, math.nan], [0.3, 0.7]], names=["layer1", "final"])
    assert pixels(full, PALETTE[0]) > 300
    assert 0 < pixels(gap, PALETTE[1]) < pixels(full, PALETTE[1]) / 2


def test_bars_cover_what_each_exit_answers():
    picture = who_answers_image([[0.25, 0.75]], names=["first", "final"])
    first, last = ([round(255 * part) for part in color] for color in ((0.0, 0.135112, 0.304751), (0.995737, 0.909344, 0.217772)))
    areas = [int((np.abs(picture.astype(int) - color).max(axis=2) <= 2).sum()) for color in (first, last)]
    assert areas[1] / areas[0] == pytest.approx(3.0, rel=0.1)
    empty = who_answers_image([[math.nan, math.nan], [0.25, 0.75]], names=["first", "final"], labels=["25%", "50%"])
    assert is_picture(empty)


def test_heat_maps_grow_with_their_table_and_show_what_is_undefined():
    small = heat_image([[0.5]], rows=["a"], columns=["0"], title="t")
    large = heat_image([[0.5] * 12] * 9, rows=list("abcdefghi"), columns=[str(n) for n in range(12)], title="t")
    assert large.shape[0] > small.shape[0]
    assert large.shape[1] > small.shape[1]
    undefined = heat_image([[math.nan]], rows=["a"], columns=["0"], title="t")
    assert pixels(undefined, "white") > pixels(small, "white") + 1000


def test_figures_of_long_streams_stop_growing():
    long = heat_image([[0.5] * 200] * 90, rows=[f"{n}" for n in range(90)], columns=[f"{n}" for n in range(200)], title="t")
    assert long.shape[0] <= 1200
    assert long.shape[1] <= 2000
    assert who_answers_image([[0.5, 0.5]] * 200, names=["a", "b"]).shape[1] <= 1400
    assert triangles_image({"a": [[0.5] * 120] * 120, "b": [[0.5] * 120] * 120}).shape[1] <= 1400


def test_triangles_have_experiences_down_and_time_across():
    def cells(picture):
        """Median color of the lower left and of the upper right cell of two."""
        height, width, _ = picture.shape
        rows, columns = (height // 4, 2 * height // 3), (width // 4, 3 * width // 4)
        return [tuple(np.median(picture[rows[r] : rows[r] + 20, columns[c] : columns[c] + 20].reshape(-1, 3), axis=0)) for r, c in ((1, 0), (0, 1))]

    before, after = cells(triangles_image({"only": [[1.0], [0.0, 1.0]]}))
    assert before == (255, 255, 255)  # experience 1 before it was learnt
    assert after[0] < 100 and after[2] > after[1]  # experience 0 after it: the dark end of viridis
    one, two = triangles_image({"a": [[1.0]]}), triangles_image({"a": [[1.0]], "b": [[0.5]]})
    assert two.shape[1] == 2 * one.shape[1]


def test_png_holds_the_picture():
    picture = curve_image({"a": CURVE})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)


@pytest.mark.parametrize("draw", [
    lambda: curve_image({}),
    lambda: triangles_image({}),
    lambda: exit_accuracy_image([], names=["a"]),
    lambda: exit_accuracy_image([[0.5]], names=["a", "b"]),
    lambda: who_answers_image([[0.5, 0.5], [1.0]], names=["a", "b"]),
    lambda: heat_image([[0.5]], rows=["a", "b"], columns=["0"], title="t"),
])  # fmt: skip
def test_what_cannot_be_drawn(draw):
    with pytest.raises(ClframeError, match="give"):
        draw()


def test_pyplot_is_never_imported():
    # Avalanche imports it with the package; taken away again, it stays away unless we import it.
    code = ("import sys, matplotlib, clframe.training; "
            "sys.modules.pop('matplotlib.pyplot', None); vars(matplotlib).pop('pyplot', None); "
            "from clframe.plotting.images import heat_image; "
            "heat_image([[1.0]], rows=['a'], columns=['0'], title='t'); "
            "sys.exit('matplotlib.pyplot' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
