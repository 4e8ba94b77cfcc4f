"""Progress of a run: the time left by hand, few reads of the loss, and numbers that do not depend on the bar."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import clframe
from clframe.progress import hide_progress, is_shown
from clframe.results import Result
from clframe.training import display as display_module
from clframe.training import monitor as monitor_module
from clframe.training.display import DRAWS, Display, RemainingTime, format_duration
from clframe.training.run_log import RunLog

SMALL = ["backbone=mlp", "backbone.width=8", "trainer.epochs=2", "benchmark.experiences=2", "strategy=er(memory=20)"]


def test_time_left_is_that_of_steps_and_evaluations():
    left = RemainingTime([4, 6, 2])
    left.set_evaluation(5.0)
    left.begin_experience(0, 4)
    assert math.isnan(left.seconds())
    left.add_step(10.0)  # includes the preparation of the experience: not a measurement
    assert math.isnan(left.seconds())
    left.add_step(12.0)
    left.add_step(14.0)
    assert left.seconds() == pytest.approx((12 - 3) * 2.0 + 3 * 5.0)
    left.add_step(16.0)
    left.end_experience()
    left.end_evaluation(24.0)  # 8 s after the last step
    left.begin_experience(1, 6)
    assert left.seconds() == pytest.approx(8 * 2.0 + 2 * 8.0)  # until its own steps are timed
    left.add_step(30.0)
    left.add_step(33.0)
    assert left.seconds() == pytest.approx((8 - 2) * 3.0 + 2 * 8.0)


def test_steps_are_corrected_where_an_experience_has_others_than_expected():
    left = RemainingTime([10, 10, 20, 20])
    left.begin_experience(0, 10)
    for now in range(7):
        left.add_step(float(now))
    left.end_experience()  # early stopping
    assert (left.done, left.total) == (7, 57)
    left.begin_experience(1, 15)  # a buffer has joined the epoch: half as many again, later on too
    assert (left.done, left.total) == (7, 7 + 15 + 30 + 30)


def test_a_resumed_run_starts_where_it_was():
    left = RemainingTime([10, 10], finished=1)
    assert left.done == 10
    left.begin_experience(1, 10, done=4)
    assert (left.done, left.total) == (14, 20)


class Loss:
    """A loss that counts how often it is read."""

    def __init__(self):
        self.reads = 0

    def detach(self):
        self.reads += 1
        return torch.tensor([0.25])


def test_the_loss_is_read_when_the_bar_is_drawn_and_the_bar_is_drawn_a_few_times_a_second(monkeypatch):
    clock = SimpleNamespace(now=50.0, perf_counter=lambda: clock.now)
    drawn = []
    bar = SimpleNamespace(
        set_description_str=lambda text, refresh: drawn.append([text]), close=lambda: None, refresh=lambda: None,
        set_postfix_str=lambda text, refresh: drawn[-1].append(text),
    )  # fmt: skip
    monkeypatch.setattr(display_module, "time", clock)
    monkeypatch.setattr(display_module, "progress_bar", lambda *_, **__: bar)
    strategy = SimpleNamespace(batch=SimpleNamespace(y=[0] * 8), loss=Loss(), clock=SimpleNamespace(train_exp_epochs=2))
    shown = Display(RemainingTime([1000, 1000]), experiences=2)
    shown.begin_experience(0, steps=1000, epochs=5)
    for _ in range(1000):  # 10 seconds
        clock.now += 0.01
        shown.step(strategy)
    assert 10 * DRAWS - 5 <= strategy.loss.reads <= 10 * DRAWS + 1
    assert drawn[-1][0] == "experience 1/2, epoch 3/5"
    assert re.fullmatch(r"0:1\d left, loss 0\.25, 800 samples/s", drawn[-1][1])
    shown.begin_evaluation()
    clock.now += 1
    shown.end_evaluation(0.875)
    shown.begin_experience(1, steps=1000)
    assert drawn[-1] == ["experience 2/2", "0:11 left, accuracy so far 87.5 %"]


@pytest.mark.parametrize("seconds, text", [(59.6, "1:00"), (5999, "99:59"), (6000, "1 h 40 min")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_bars_are_shown_on_a_terminal_unless_they_are_hidden(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    assert is_shown()
    with hide_progress(False):
        assert is_shown()
    with hide_progress(), hide_progress():
        assert not is_shown()
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_shown()


def weights(result):
    return clframe.load(result.run_folder).network.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drawing):
    """The same run without and with the bar, which tests only look at."""
    found = []
    for shown in (False, True):
        with pytest.MonkeyPatch.context() as patch, drawing():
            patch.setattr(monitor_module, "is_shown", lambda shown=shown: shown)
            patch.setattr(display_module, "DRAWS", 1e9)  # draw at every step
            loggers = "[tensorboard]" if shown else "[]"
            found.append(clframe.run("quickstart", [*SMALL, f"trainer.loggers={loggers}"], output=tmp_path_factory.mktemp("run")))
    return found


def test_the_bar_changes_no_number(runs):
    plain, shown = runs
    for name in ("accuracy_matrix", "metrics", "loss_terms", "confusion", "steps", "exits"):
        assert str(getattr(plain, name)) == str(getattr(shown, name))
    one, two = weights(plain), weights(shown)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_log_has_one_line_per_experience(runs):
    result = runs[0]
    folder = result.run_folder
    with open(f"{folder}/log.txt") as file:
        start, *lines, end = [line.split("  ", 1)[1].rstrip("\n") for line in file]
    assert (start, end) == ("started", "finished")
    for i, line in enumerate(lines):
        ids = " ".join(map(str, result.experiences[i]))
        seen = sum(result.accuracy_matrix[i][: i + 1]) / (i + 1)
        assert line.startswith(
            f"experience {i + 1}/2 (classes {ids}): accuracy {100 * result.accuracy_matrix[i][i]:.2f} %, "
            f"{100 * seen:.2f} % over the experiences so far; loss/task/ce {result.loss_terms[i]['loss/task/ce']:.4g}; "
        )
        (size,) = re.findall(r"checkpoint ([0-9.]+) MB$", line)
        with open(f"{folder}/checkpoints/experience_{i + 1:03d}.ckpt", "rb") as file:
            assert float(size) == pytest.approx(len(file.read()) / 1e6, abs=6e-4)
    assert len(lines) == 2 and f"; {result.batches} batches so far; " in lines[-1]


def test_the_confusion_matrix_has_the_accuracies_on_its_diagonal(runs):
    result = Result.from_json(f"{runs[0].run_folder}/results.json")
    assert len(result.confusion) == 10 and sum(map(sum, result.confusion)) == sum(result.test_samples)
    for i, (row, c) in enumerate(zip(result.confusion, result.class_order, strict=True)):
        assert row[i] / sum(row) == result.accuracy_by_class[c]


def test_the_confusion_matrix_of_a_finished_run_that_is_resumed_is_the_same(runs):
    again = clframe.run(resume=runs[0].run_folder)
    assert again.confusion == runs[0].confusion != ()
    with open(f"{runs[0].run_folder}/log.txt") as file:
        assert [line.split("  ", 1)[1] for line in file][-2:] == ["resumed after experience 2/2\n", "finished\n"]


def test_tensorboard_has_a_picture_of_it_at_the_end(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{runs[1].run_folder}/tensorboard", size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("2_pictures/confusion_matrix")] == [1]


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    log = RunLog(tmp_path / "missing", experiences=3)
    log.open(finished=0)
    log.close()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'missing' / 'log.txt'}: cannot be written (No such file or directory); the run continues without it"
    ]


def test_a_run_that_stops_says_where(tmp_path):
    log = RunLog(tmp_path, experiences=3)
    log.open(finished=1)
    log.close()
    log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [
        "resumed after experience 1/3", "stopped after experience 1/3",
    ]  # fmt: skip
