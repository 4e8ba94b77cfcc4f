"""What TensorBoard and the run folder show of exits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import clframe
from clframe.exits.failure import LABELS
from clframe.training.tensorboard import FAILURE

pytestmark = pytest.mark.figures

FAST = ["backbone=mlp", "backbone.width=10", "trainer.epochs=1", "trainer.progress=false", "benchmark.experiences=2",
        "benchmark.validation=0.2", "trainer.loggers=[tensorboard]"]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return clframe.run("quickstart", [*FAST, "strategy=er(memory=30) + exits"], output=tmp_path_factory.mktemp("exits"))


def events(result):
    found = EventAccumulator(f"{result.run_folder}/tensorboard", size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_every_exit_is_drawn_over_experiences(result):
    found = events(result)
    for k, name in enumerate(("layer1", "final")):
        accuracy = [event.value for event in found.Scalars(f"exit_accuracy/0{k}_{name}")]
        assert accuracy == pytest.approx([record.accuracy_K[k] for record in result.exits])
        (forgetting,) = found.Scalars(f"exit_forgetting/0{k}_{name}")  # none before the second experience
        assert (forgetting.step, forgetting.value) == (1, pytest.approx(result.exit_forgetting[k]))
    overthinking = found.Scalars("exit_decision/overthinking")[-1].value
    assert overthinking == pytest.approx(result.exits[-1].overthinking)
    point = next(p for p in result.exits[-1].points.points if p.name == "100%")
    assert found.Scalars("exit_accuracy_at_cost/100")[-1].value == pytest.approx(point.accuracy)


def test_the_layout_that_counts_has_charts_of_exits_and_they_find_their_tags(result):
    found = events(result)
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "progress", "training", "experiences", "exits", FAILURE
    ]
    tags = found.Tags()["scalars"]
    (exits,) = (category for category in layout.category if category.title == "exits")
    (failure,) = (category for category in layout.category if category.title == FAILURE)
    for chart in (*exits.chart, *failure.chart):
        assert chart.margin.series and all(series.value in tags for series in chart.margin.series), chart.title
    assert {chart.title for chart in failure.chart} == {f"{label} per exit" for label in LABELS.values()}
    assert "exit_eefp/00_layer1" in tags and "exit_eefp/01_final" not in tags  # undefined at the last exit
    assert "exit usage at a budget of 50 %" not in [chart.title for chart in exits.chart]  # the first exit is dearer here


def test_figures_are_images_and_files(result):
    found, names = events(result), {"curve", "accuracy", "similarity", "exit_usage"}
    for name in names:
        tag = "2_pictures/accuracy_and_cost" if name == "curve" else f"exits/{name}"
        assert [event.step for event in found.Images(tag)] == [1]  # drawn once, at the end
    files = {path.name for path in (Path(result.run_folder) / "figures").iterdir()}
    assert files == {"accuracy_matrix.png", "confusion_matrix.png", *(f"exits_{name}.png" for name in names)}


def test_a_plain_network_has_no_exits_to_show(tmp_path):
    plain = clframe.run("quickstart", [*FAST, "strategy=naive"], output=tmp_path)
    tags = events(plain).Tags()
    assert not [tag for tag in (*tags["scalars"], *tags["images"]) if tag.startswith("exit")]
    assert {path.name for path in (Path(plain.run_folder) / "figures").iterdir()} == {"accuracy_matrix.png", "confusion_matrix.png"}
