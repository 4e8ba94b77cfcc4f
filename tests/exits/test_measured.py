"""Graphs are used where they were measured to be faster, after plain inference has taken as long as recording them."""

from __future__ import annotations

import pytest
import torch
from exit_networks import assert_same, inputs, network, reference, split
from recorded_graphs import RecordedGraphs

from clframe.exits import captured, captured_segments, measured
from clframe.exits.captured import CapturedNetwork
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.measured import MeasuredNetwork
from clframe.exits.policies import ExitPolicy


@pytest.fixture
def prepared(monkeypatch):
    """A network, its runner, and the seconds that calls of the plain network and of graphs are said to take."""
    net = network("mlp")
    confidence, thresholds = split(net, "margin", inputs(net, 33))
    dynamic = DynamicNetwork(net, ExitPolicy(measure=confidence, thresholds=thresholds))
    seconds = {DynamicNetwork: 2.0, CapturedNetwork: 1.0}

    def timed(call, device):
        return call(), seconds[type(call.func)]

    monkeypatch.setattr(measured, "time_call", timed)
    for module in (captured, captured_segments, measured):
        monkeypatch.setattr(module, "WARM", 0)
    made = []

    def make(dynamic, batch):
        made.append(CapturedNetwork(dynamic, batch=batch, graphs=RecordedGraphs()))
        return made[-1]

    return net, MeasuredNetwork(dynamic, after=3.0, make=make), seconds, made


@pytest.mark.parametrize("own", [1.0, 4.0])
def test_the_faster_one_is_used_once_it_is_worth_a_measurement(prepared, own):
    net, runner, seconds, made = prepared
    seconds[CapturedNetwork] = own
    for number in range(4):
        x = inputs(net, 9)
        assert_same(runner(x), reference(net, runner.dynamic.policy, x))
        assert len(made) == (number >= 2)  # two calls of two seconds each
    assert isinstance(runner._chosen, CapturedNetwork if own < 2 else DynamicNetwork)
    start = "CUDA graphs: 1000.00 ms for 9 inputs, 2000.00 without; stopped inputs removed after " if own < 2 else (
        "no CUDA graphs: 4000.00 ms with them for 9 inputs, 2000.00 without"
    )  # fmt: skip
    assert runner.note.startswith(start)
    x = inputs(net, 4)  # the last batch is smaller
    assert_same(runner(x), reference(net, runner.dynamic.policy, x))
    assert len(made) == 1


def test_a_small_batch_does_not_decide_for_large_ones(prepared):
    """With two seconds a call, a measurement is due at the third one, which is the small last one of its data."""
    net, runner, _, made = prepared
    for size, batches in ((9, []), (9, []), (4, []), (5, [9]), (12, [9]), (9, [9]), (12, [9]), (2, [9]), (12, [9, 12])):
        x = inputs(net, size)
        assert_same(runner(x), reference(net, runner.dynamic.policy, x))
        assert [graphs.batch for graphs in made] == batches, size
    assert runner._chosen is made[1] and "for 12 inputs" in runner.note


def test_what_cannot_be_recorded_stays_plain(prepared, monkeypatch):
    net, runner, _, made = prepared

    def refuse(graphs, work):
        raise RuntimeError("waits for the device")

    monkeypatch.setattr(RecordedGraphs, "record", refuse)
    for _ in range(5):
        x = inputs(net, 9)
        assert_same(runner(x), reference(net, runner.dynamic.policy, x))
    assert len(made) == 1 and made[0].failure and runner._chosen is runner.dynamic and not runner.note


def test_empty_batches_choose_nothing(prepared):
    _, runner, _, made = prepared
    runner._spent = 100.0
    assert runner(torch.zeros(0, 12)).scores_BC.shape == (0, 6)
    assert not made
