"""Recorders: their seconds are in the ledger, they run once an experience, and no figure is drawn twice."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clframe
import clframe.training.pictures
from clframe.accounting import Ledger
from clframe.files import read_json
from clframe.plotting import images, style

SMALL = ["backbone=mlp", "backbone.width=6", "trainer.epochs=1", "trainer.progress=false", "benchmark.experiences=3"]


@pytest.mark.figures
def test_the_seconds_of_every_recorder_are_in_the_ledger_and_no_figure_is_drawn_twice(tmp_path, monkeypatch):
    drawn = []
    render = style.render_pixels
    for module in (images, clframe.exits.plots, clframe.sparsity.plots):
        if hasattr(module, "render_pixels"):
            monkeypatch.setattr(module, "render_pixels", lambda figure: (drawn.append(figure), render(figure))[1])
    strategy = ["strategy=naive + exits + sparsity", "components.exits={at: [layer1]}"]
    result = clframe.run("quickstart", [*SMALL, *strategy], output=tmp_path)
    folder = Path(result.run_folder)
    names = ["accuracy_matrix", "confusion_matrix", "exits_accuracy", "exits_curve", "exits_similarity", "neurons"]
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == names
    assert len(drawn) == len(names)
    page = Image.open(folder / "figures" / "accuracy_matrix.png")
    assert np.array_equal(np.array(page), images.matrix_image(result.accuracy_matrix))
    confusion = images.confusion_image(result.confusion, names=[result.class_label(c) for c in result.class_order])
    assert np.array_equal(np.array(Image.open(folder / "figures" / "confusion_matrix.png")), confusion)
    content = read_json(folder / "ledger.json")
    ledger, whole = Ledger.of(content["ledger"]), content["totals"]["seconds"]
    recorders = ("training", "evaluation", "activity", "exits", "accounting", "tensorboard")
    for recorder in recorders:
        seconds = [ledger.seconds(experience=i)[recorder] for i in range(3)]
        assert min(seconds) > 0 and math.isclose(sum(seconds), whole[recorder])
    assert [("figures" in ledger.seconds(experience=i)) for i in range(3)] == [False, False, True]
    assert whole["figures"] > ledger.seconds(experience=2)["figures"]  # and writing them after the run


def test_recorders_that_nothing_asks_for_do_not_run(tmp_path):
    result = clframe.run("quickstart", [*SMALL, "strategy=naive", "trainer.figures=none"], output=tmp_path)
    seconds = read_json(Path(result.run_folder) / "ledger.json")["totals"]["seconds"]
    assert "activity" not in seconds and "figures" not in seconds and seconds["exits"] > 0
    assert result.activity == () or result.activity == []
