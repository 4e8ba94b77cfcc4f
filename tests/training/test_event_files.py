"""Event files stay small and have every point once, whenever a run was killed."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from power_cuts import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import clframe
from clframe.errors import ConfigError
from clframe.run_folder import RunFolder
from clframe.training.event_files import merge_events
from clframe.training.session import Session
from clframe.training.tensorboard import THROUGHPUT, TensorBoard

ALL = {"images": 0, "scalars": 0, "tensors": 0}
RUN = ["strategy=er(memory=40) + exits + early_exit(threshold=0.5) + sparsity", "backbone=mlp", "backbone.width=20", "trainer.epochs=2",
       "trainer.progress=false", "trainer.log_every=2", "benchmark.validation=0.2", "benchmark.test_fraction=0.6",
       "trainer.loggers=[tensorboard]"]  # fmt: skip


def read(folder):
    events = EventAccumulator(str(folder), size_guidance=ALL)
    events.Reload()
    return events


def scalars(folder):
    events = read(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pictures(folder):
    events = read(folder)
    return {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in events.Tags()["images"]}


def texts(folder):
    events = read(folder)
    return {tag: [(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def write(folder, points):
    writer = SummaryWriter(str(folder))
    for tag, step, value in points:
        writer.add_scalar(tag, value, step)
    writer.close()


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


def test_what_is_kept_is_as_it_was_and_the_rest_is_gone(tmp_path):
    write(tmp_path, [("loss/a", 1, 0.5), ("loss/a", 11, 0.25), ("x", 0, 1.0), ("x", 1, 2.0)])
    before = read(tmp_path).Scalars("loss/a")[0]
    tags = merge_events(tmp_path, lambda tag, step: (tag == "loss/a" and step < 11) or tag == "x")
    assert tags == ("loss/a", "x")
    assert scalars(tmp_path) == {"loss/a": [(1, 0.5)], "x": [(0, 1.0), (1, 2.0)]}
    assert read(tmp_path).Scalars("loss/a")[0] == before  # time of day included
    assert len(os.listdir(tmp_path)) == 1


def test_points_written_twice_are_once_there_and_the_last_one_counts(tmp_path):
    write(tmp_path, [("x", 0, 1.0), ("x", 1, 2.0)])
    os.rename(next(tmp_path.iterdir()), tmp_path / "events.out.tfevents.0000000001.host.1.0")
    write(tmp_path, [("x", 1, 3.0)])
    merge_events(tmp_path, lambda tag, step: True)
    assert scalars(tmp_path) == {"x": [(0, 1.0), (1, 3.0)]}


def test_a_kill_before_the_old_files_are_gone_changes_nothing(tmp_path, monkeypatch):
    write(tmp_path, [("x", 0, 1.0), ("x", 1, 2.0)])

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", killed)
        merge_events(tmp_path, lambda tag, step: step < 1)
    assert len(os.listdir(tmp_path)) == 2
    assert scalars(tmp_path) == {"x": [(0, 1.0)]}
    merge_events(tmp_path, lambda tag, step: True)
    assert scalars(tmp_path) == {"x": [(0, 1.0)]}


def test_a_kill_while_they_are_merged_leaves_nothing_after_the_next_resumption(tmp_path, monkeypatch):
    write(tmp_path / "tensorboard", [("x", 0, 1.0)])

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        merge_events(tmp_path / "tensorboard", lambda tag, step: True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2 and scalars(tmp_path / "tensorboard") == {"x": [(0, 1.0)]}
    RunFolder(tmp_path).prepare_resume()
    (left,) = (tmp_path / "tensorboard").iterdir()
    assert left.name.startswith("events.out.tfevents.") and scalars(tmp_path / "tensorboard") == {"x": [(0, 1.0)]}


def test_a_full_disk_is_raised_and_printed_by_no_thread(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    before = threading.excepthook
    board = TensorBoard(tmp_path, experiences=2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            for step in range(100):
                board.scalars({"x": 1.0}, step)
                board.flush()
    with pytest.raises(OSError, match="No space left"):
        board.close()
    assert capsys.readouterr().err == "" and threading.excepthook == before


def test_a_file_that_was_cut_short_is_read_up_to_there(tmp_path):
    write(tmp_path, [("x", step, float(step)) for step in range(5)])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    merge_events(tmp_path, lambda tag, step: True)
    assert scalars(tmp_path) == {"x": [(step, float(step)) for step in range(4)]}


def test_no_files_are_no_matter(tmp_path):
    assert merge_events(tmp_path / "none", lambda tag, step: True) == ()
    assert not (tmp_path / "none").exists()


def test_steps_and_experiences_are_cut_each_at_its_own_place(tmp_path):
    board = TensorBoard(tmp_path, experiences=3)
    for step in (3, 6, 9):
        board.scalars({"loss/task/ce": 1.0, THROUGHPUT: 5.0, "train/learning_rate": 0.1}, step)
    for experience in range(3):
        board.scalars({"1_progress/accuracy": 0.5, "final/forgetting": 0.25}, experience)
    board.close()
    TensorBoard(tmp_path, experiences=3, finished=2, steps=6).close()
    assert scalars(tmp_path) == {
        "loss/task/ce": [(3, 1.0), (6, 1.0)],
        THROUGHPUT: [(3, 5.0), (6, 5.0)],
        "train/learning_rate": [(3, pytest.approx(0.1)), (6, pytest.approx(0.1))],
        "1_progress/accuracy": [(0, 0.5), (1, 0.5)],
    }


def run_killed(output, monkeypatch, *, where, after, options=(*RUN, "benchmark.experiences=3")):
    """Break off in ``Session.<where>`` after so many experiences, then resume."""
    original, count = getattr(Session, where), iter(range(100))

    def broken(self, *arguments):
        if next(count) == after:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Session, where, broken)
        clframe.run("quickstart", options, output=output)
    (folder,) = output.glob("quickstart/*")
    return clframe.run(resume=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawing):
    with drawing():
        return clframe.run("quickstart", [*RUN, "benchmark.experiences=3"], output=tmp_path_factory.mktemp("whole"))


# _save: everything has been drawn, the checkpoint has not been written; _train: the next one has not begun.
@pytest.mark.parametrize(
    ("where", "after"),
    [pytest.param("_save", 0, marks=pytest.mark.slow), pytest.param("_save", 1, marks=(pytest.mark.figures, pytest.mark.slow)), ("_train", 2)],
)
def test_a_resumed_run_has_the_points_of_one_that_was_not_stopped(where, after, whole, tmp_path, monkeypatch, request):
    broken = run_killed(tmp_path, monkeypatch, where=where, after=after)
    here, there = (Path(result.run_folder) / "tensorboard" for result in (broken, whole))
    found, expected = scalars(here), scalars(there)
    for tag, points in found.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    assert [step for step, _ in found.pop(THROUGHPUT)] == [step for step, _ in expected.pop(THROUGHPUT)]
    assert found == expected
    assert len(found["loss/task/ce"]) > 20
    assert found["exits_used/00_layer1"][-1][0] == 2
    drawn, expected = pictures(here), pictures(there)
    if request.node.get_closest_marker("figures"):
        assert drawn == expected
        assert {tag: [step for step, _ in points] for tag, points in drawn.items()} == {tag: [2] for tag in drawn}
        assert {"2_pictures/accuracy_matrix", "2_pictures/exits_used", "2_pictures/neurons", "exits/accuracy"} <= set(drawn)
    assert texts(here)["2_pictures/accuracy_matrix/text_summary"] == texts(there)["2_pictures/accuracy_matrix/text_summary"]
    assert texts(here)["custom_scalars__config__"][-1][1] == texts(there)["custom_scalars__config__"][-1][1]
    assert broken.activity == whole.activity


def test_the_entry_that_ends_an_experience_is_there_once_where_a_kill_follows_it(tmp_path, monkeypatch):
    """The newest checkpoint is that of the last step, 18, before the entry of the steps 17 and 18."""
    options = [*TINY, "trainer.loggers=[tensorboard]", "trainer.log_every=4", "trainer.checkpoint.every=1", "trainer.figures=none"]
    result = run_killed(tmp_path, monkeypatch, where="_evaluate", after=1, options=options)
    found = scalars(Path(result.run_folder) / "tensorboard")
    for tag in ("loss/task/ce", "train/learning_rate", THROUGHPUT):
        assert [step for step, _ in found[tag]] == [4, 8, 12, 16, 18, 22, 26, 30, 34, 36], tag


@pytest.mark.figures
@pytest.mark.parametrize(("figures", "steps"), [
    pytest.param("experience", [0, 1], marks=pytest.mark.slow), ("none", []),
])
def test_figures_are_drawn_when_the_config_says(figures, steps, tmp_path):
    overrides = [*RUN, "benchmark.experiences=2", "benchmark.classes=4", "trainer.epochs=1", f"trainer.figures={figures}"]
    folder = Path(clframe.run("quickstart", overrides, output=tmp_path).run_folder)
    found = pictures(folder / "tensorboard")
    assert [step for step, _ in found.get("2_pictures/accuracy_matrix", [])] == steps
    assert (folder / "figures").exists() == bool(steps)
    times = json.loads((folder / "ledger.json").read_text())["ledger"]["times"]
    # One row an experience for TensorBoard's, one at the end for the files.
    assert [row["experience"] for row in times if row["phase"] == "figures"] == [*steps, *([None] if steps else [])]
    assert [row["experience"] for row in times if row["phase"] == "tensorboard"] == [0, 1]


def test_figures_after_every_experience_need_tensorboard():
    message = r"trainer.figures: found 'experience' .text.; add tensorboard to trainer.loggers or give end"
    with pytest.raises(ConfigError, match=message):
        clframe.explain("quickstart", ["trainer.figures=experience", "trainer.loggers=[csv]"])
