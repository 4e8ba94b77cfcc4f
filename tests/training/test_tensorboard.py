"""The event file read back: exact tags, steps and values."""

from __future__ import annotations

import io
import math
import os
import re
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from clframe.metrics import Tally
from clframe.plotting.images import matrix_image, matrix_markdown
from clframe.plotting.style import PAPER
from clframe.training.pictures import draw_pictures
from clframe.training.tensorboard import CURVES, LEARNING_RATE, LOSS, THROUGHPUT, TensorBoard

pytestmark = pytest.mark.figures

NAN = float("nan")
CONTINUAL = {
    "continual/accuracy_task_aware", "continual/accuracy_over_all_samples", "continual/average_incremental_accuracy",
    "continual/learning_accuracy", "continual/backward_transfer",
}  # fmt: skip


def tally(*right, size=8, aware=None):
    columns = len(right)

    def spread(values):
        return [[values[j] * (c == j) for c in range(columns)] for j in range(columns)]

    return Tally(spread([size] * columns), spread(right), spread(aware or right))


TALLIES = [tally(8, 0, 0, aware=(8, 4, 4)), tally(4, 8, 0, aware=(8, 8, 4)), tally(2, 4, 6, aware=(8, 8, 8))]


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def points(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def written(tmp_path):
    board = TensorBoard(tmp_path, experiences=3)
    board.scalars({"loss/task": 2.5, LEARNING_RATE: 0.125}, 1)
    board.scalars({"loss/task": 0.5, "loss/lwf/distill": math.inf}, 11)
    for i in range(3):
        board.evaluation(TALLIES[: i + 1])
        accuracy_TE = [tally.accuracy_E for tally in TALLIES[: i + 1]]
        board.pictures(draw_pictures(accuracy_TE, names=["final"]), accuracy_TE=accuracy_TE)
        board.write_layout(i + 1)
    board.close()
    return read(tmp_path)


def test_scalars(written):
    assert points(written, "loss/task") == [(1, 2.5), (11, 0.5)]
    assert points(written, LEARNING_RATE) == [(1, 0.125)]
    assert points(written, "loss/lwf/distill") == [(11, math.inf)]


def test_an_evaluation_has_accuracies_averages_and_transfer(written):
    assert points(written, "experience_accuracy/00") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert points(written, "experience_accuracy/01") == [(1, 1.0), (2, 0.5)]
    assert points(written, "experience_accuracy/02") == [(2, 0.75)]
    assert points(written, "1_progress/accuracy") == [(0, 1.0), (1, 0.75), (2, 0.5)]
    assert points(written, "continual/accuracy_task_aware") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert points(written, "1_progress/forgetting") == [(1, 0.5), (2, (0.75 + 0.5) / 2)]
    assert points(written, "continual/backward_transfer") == [(1, -0.5), (2, (-0.75 - 0.5) / 2)]
    assert points(written, "continual/learning_accuracy") == [(0, 1.0), (1, 1.0), (2, pytest.approx((1 + 1 + 0.75) / 3))]
    assert points(written, "continual/accuracy_over_all_samples") == [(0, 1.0), (1, 0.75), (2, 0.5)]


def test_there_are_no_other_tags(written):
    assert set(written.Tags()["scalars"]) == {
        "1_progress/accuracy", "1_progress/forgetting", *CONTINUAL,
        "experience_accuracy/00", "experience_accuracy/01", "experience_accuracy/02",
        "loss/task", "loss/lwf/distill", LEARNING_RATE,
    }  # fmt: skip
    assert written.Tags()["images"] == ["2_pictures/accuracy_matrix"]
    assert set(written.Tags()["tensors"]) == {"2_pictures/accuracy_matrix/text_summary", "custom_scalars__config__"}


def test_the_matrix_is_an_image_under_one_tag_per_experience(written):
    events = written.Images("2_pictures/accuracy_matrix")
    assert [event.step for event in events] == [0, 1, 2]
    stored = np.asarray(Image.open(io.BytesIO(events[2].encoded_image_string)))
    assert np.array_equal(stored, matrix_image([t.accuracy_E for t in TALLIES]))


def test_the_matrix_is_text_too(written):
    events = written.Tensors("2_pictures/accuracy_matrix/text_summary")
    assert [event.step for event in events] == [0, 1, 2]
    assert events[1].tensor_proto.string_val[0].decode() == (
        "| after | 0 | 1 | 2 |\n|---|---|---|---|\n"
        "| **0** | 100.0 | 0.0 | 0.0 |\n| **1** | 50.0 | 100.0 | 0.0 |"
    )


def test_every_chart_of_the_layout_finds_its_tags_and_the_last_layout_has_all(written):
    events = written.Tensors("custom_scalars__config__")
    assert [event.step for event in events] == [1, 2]  # forgetting comes up with the second experience
    layout = layout_pb2.Layout.FromString(events[-1].tensor_proto.string_val[0])
    tags = written.Tags()["scalars"]
    shown = {
        chart.title: {tag for tag in tags for pattern in chart.multiline.tag if re.match(pattern, tag)}
        | {series.value for series in chart.margin.series}
        for category in layout.category
        for chart in category.chart
    }
    assert [category.title for category in layout.category] == ["progress", "training", "experiences"]
    assert shown == {
        "accuracy over the experiences so far": {"1_progress/accuracy"},
        "forgetting": {"1_progress/forgetting"},
        "losses by term": {"loss/task", "loss/lwf/distill"},
        "accuracy per experience": {f"experience_accuracy/0{j}" for j in range(3)},
        "further metrics": CONTINUAL,
        "learning rate": {LEARNING_RATE},
    }


def test_only_curves_over_training_steps_are_smoothed(written):
    first, last = (
        layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        for event in written.Tensors("custom_scalars__config__")
    )
    for category in last.category:
        for chart in category.chart:
            assert bool(chart.multiline.tag) == (category.title == "training") != bool(chart.margin.series)
            assert all(series.lower == series.value == series.upper for series in chart.margin.series)
    experiences = [chart for layout in (first, last) for c in layout.category for chart in c.chart if "per experience" in chart.title]
    # The chart is the same from the start: TensorBoard shows charts of several runs once if they are equal.
    assert experiences[0] == experiences[1] and len(experiences[0].margin.series) == 3


def test_the_first_page_comes_first():
    tags = [LOSS, THROUGHPUT, "1_progress/accuracy", "loss/task/ce", "experience_accuracy/00", "2_pictures/neurons", "final/x"]
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in sorted(tags)))
    assert groups[:2] == ["1_progress", "2_pictures"]


def test_what_was_not_evaluated_is_no_point(tmp_path):
    board = TensorBoard(tmp_path, experiences=2)
    board.evaluation([Tally(((4, 0), (0, 0)), ((3, 0), (0, 0)), ((4, 0), (0, 0)))])
    board.close()
    assert set(read(tmp_path).Tags()["scalars"]) == {
        "experience_accuracy/00", "1_progress/accuracy", *(CONTINUAL - {"continual/backward_transfer"}),
    }  # fmt: skip


def test_experience_numbers_sort_as_text(tmp_path):
    board = TensorBoard(tmp_path, experiences=101)
    board.evaluation([tally(*[1] * 101)] * 101)
    board.close()
    tags = [tag for tag in read(tmp_path).Tags()["scalars"] if tag.startswith("experience_accuracy/")]
    assert sorted(tags) == [f"experience_accuracy/{j:03d}" for j in range(0, 101, 6)]
    assert len(tags) <= CURVES  # all of them would be points by the square of the experiences


def hparam_content(events, tag):
    content = events.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_hyper_parameters_and_final_metrics_are_in_the_same_folder(tmp_path):
    board = TensorBoard(tmp_path, experiences=3)
    board.hyper_parameters(
        {"strategy": "er + lwf", "seed": 3, "components": {"er": {"memory": 200}, "lwf": {"alpha": 0.5}},
         "pinned": True, "at": [1, 2], "none": None},
        metrics={"final_average_accuracy": 0.75, "forward_transfer": NAN},
        step=2,
    )  # fmt: skip
    board.close()
    names = os.listdir(tmp_path)
    assert len(names) == 1
    assert names[0].startswith("events.out.tfevents.")
    events = read(tmp_path)
    session = hparam_content(events, metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert {key: value.string_value or value.number_value for key, value in session.items()} == {
        "strategy": "er + lwf", "seed": 3.0, "components.er.memory": 200.0, "components.lwf.alpha": 0.5,
        "pinned": "True", "at": "[1, 2]", "none": "None",
    }  # fmt: skip
    experiment = hparam_content(events, metadata.EXPERIMENT_TAG).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["final/final_average_accuracy"]
    assert points(events, "final/final_average_accuracy") == [(2, 0.75)]
    assert "final/forward_transfer" not in events.Tags()["scalars"]


def test_closing_twice_is_fine(tmp_path):
    board = TensorBoard(tmp_path, experiences=1)
    board.close()
    board.close()
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 5), (5, 1),
                                                pytest.param(30, 30, marks=pytest.mark.slow), (31, 31)])  # fmt: skip
def test_the_image_is_large_enough_to_read(rows, columns):
    image = matrix_image([[0.5] * columns for _ in range(rows)])
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image.shape[0] >= 250
    assert image.shape[1] >= 400
    if columns <= 30:
        assert image.shape[1] >= 50 * columns  # two digits of 11 points are about 20 pixels wide


def test_the_image_tells_accuracies_apart_and_leaves_gaps_empty():
    def color(accuracy):
        image = matrix_image([[accuracy]])
        return tuple(int(v) for v in np.median(image[100:150, 120:160].reshape(-1, 3), axis=0))

    assert color(NAN) == tuple(round(255 * part) for part in to_rgb(PAPER))
    assert color(1.0)[0] < color(0.5)[0] < color(0.0)[0] < color(NAN)[0]  # more blue, more accurate


def test_the_image_has_digits_drawn_in():
    def colors(count):  # in the middle of a uniform matrix
        image = matrix_image([[0.25] * count for _ in range(count)])
        height, width, _ = image.shape
        middle = image[height // 2 - 60 : height // 2 + 60, width // 2 - 60 : width // 2 + 60]
        return len(np.unique(middle.reshape(-1, 3), axis=0))

    assert colors(30) > 1
    assert colors(31) == 1  # too many for digits: colors only


def test_pyplot_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    matrix_image([[0.5]])
    assert "matplotlib.pyplot" not in sys.modules


def test_markdown_has_a_column_for_each_experience():
    assert matrix_markdown([[0.5]]) == "| after | 0 |\n|---|---|\n| **0** | 50.0 |"
