"""What the monitor adds to TensorBoard: throughput without the time that is no training, and few enough points."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clframe.training import monitor as monitor_module
from clframe.training.monitor import POINTS, Monitor
from clframe.training.tensorboard import GRADIENT_NORM, LEARNING_RATE, LOSS, THROUGHPUT


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(monitor_module, "time", made)
    return made


def strategy(size, terms):
    """Just what a monitor looks at."""
    return SimpleNamespace(
        batch=SimpleNamespace(y=[0] * size),
        learner=SimpleNamespace(flush_terms=lambda: dict(terms), loss_sums=SimpleNamespace(steps=2)),
        gradient_norm=lambda: 3.5,
        clock=SimpleNamespace(train_iterations=0),
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.125}]),
    )


def step(monitor, on, clock, seconds):
    on.clock.train_iterations += 1
    clock.now += seconds
    monitor.on_step(on)


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_samples_a_second_between_two_looks(tmp_path, clock):
    monitor = Monitor(tmp_path, experiences=2, log_every=2, progress=False)
    monitor.open(finished=0, steps=0)
    clock.now += 1000  # loading, say
    monitor.begin_experience(0, steps=5)
    small = strategy(3, {"loss/task/ce": 0.5, "loss/lwf/distill": 0.25})
    step(monitor, small, clock, 0.5)
    step(monitor, small, clock, 1.0)  # 6 samples in 1.5 s
    step(monitor, small, clock, 0.25)
    small.batch.y = [0] * 5
    step(monitor, small, clock, 0.25)  # 8 samples in 0.5 s
    step(monitor, small, clock, 2.0)
    monitor.flush(small)  # 5 samples in 2 s
    monitor.flush(small)  # nothing new
    monitor.end_experience()
    clock.now += 50.0  # evaluation
    monitor.begin_experience(1, steps=2)
    step(monitor, small, clock, 1.0)
    step(monitor, small, clock, 1.0)
    monitor.end_experience()
    monitor.close()
    found = scalars(tmp_path)
    assert found[THROUGHPUT] == [(2, 4.0), (4, 16.0), (5, 2.5), (7, 5.0)]
    assert found[LOSS] == [(2, 0.75), (4, 0.75), (5, 0.75), (7, 0.75)]
    assert found[LEARNING_RATE][0] == (2, 0.125)
    assert found[GRADIENT_NORM][0] == (2, 3.5)
    with open(tmp_path / "metrics.csv", newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert names == {"loss/task/ce", "loss/lwf/distill", LEARNING_RATE, GRADIENT_NORM}  # no sums and rates


@pytest.mark.parametrize("looks", [POINTS, POINTS + 1, 2 * POINTS + 5])
def test_no_more_points_than_a_curve_needs_and_all_rows(looks, tmp_path, clock):
    monitor = Monitor(tmp_path, experiences=1, log_every=1, progress=False)
    monitor.open(finished=0, steps=0)
    monitor.begin_experience(0, steps=looks)
    one = strategy(1, {"loss/task/ce": 0.5})
    for _ in range(looks):
        step(monitor, one, clock, 0.5)
    monitor.end_experience()
    monitor.close()
    steps = [at for at, _ in scalars(tmp_path)["loss/task/ce"]]
    every = {POINTS: 1, POINTS + 1: 2, 2 * POINTS + 5: 3}[looks]
    assert steps == list(range(1, looks + 1, every))
    assert len(steps) <= POINTS
    assert (tmp_path / "metrics.csv").read_text().count("loss/task/ce") == looks
