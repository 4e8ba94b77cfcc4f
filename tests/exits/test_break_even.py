"""The break-even is copying over computing, by a clock that stages and copies move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clframe.exits import break_even
from clframe.exits.break_even import measure_break_even
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import Backbone


class Clock:
    now = 0.0


class Stage(nn.Linear):
    def __init__(self, seconds: float) -> None:
        super().__init__(3, 3)
        self.seconds = seconds

    def forward(self, x):
        Clock.now += self.seconds
        return super().forward(x)


def network(seconds: list[float], taps: list[str]) -> Network:
    stages = [(f"s{i}", Stage(value), (3,)) for i, value in enumerate(seconds)]
    return Network(Backbone(stages, input_shape=(3,)), exits=[(tap, GrowingLinear(3)) for tap in taps]).eval()


def copying(value, keep_r):
    assert keep_r.tolist() == list(range(8))
    Clock.now += 0.5
    return value


@pytest.mark.parametrize(
    ("taps", "expected"),
    [([], 0.0), (["s0"], 0.5 / 15), (["s0", "s2"], 0.5 / 5), (["s2", "s2", "s3"], 0.5 / 4), (["s0", "s3"], 0.5 / 4)],
)
def test_it_is_the_time_to_copy_over_the_time_to_the_next_exit(monkeypatch, taps, expected):
    monkeypatch.setattr(break_even, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(break_even, "rows_of_flow", copying)
    # From s0 to s2 are 3 + 2 seconds, from s2 to s3 are 6, from s3 to the end 4.
    assert measure_break_even(network([1.0, 3.0, 2.0, 6.0, 4.0], taps), batch=8) == pytest.approx(expected)


def test_it_is_never_more_than_all(monkeypatch):
    monkeypatch.setattr(break_even, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(break_even, "rows_of_flow", copying)
    assert measure_break_even(network([1.0, 0.1], ["s0"]), batch=8) == 1.0


def test_it_measures_a_real_network():
    torch.manual_seed(0)
    assert 0 < measure_break_even(network([0.0, 0.0], ["s0"]), batch=8, repetitions=2) <= 1
