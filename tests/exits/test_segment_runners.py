"""Runs of one segment of dynamic inference, as they are and as graphs: the same results, also after the network changes."""

from __future__ import annotations

import pytest
import torch
from exit_networks import inputs, network, reference, split
from exit_requests import EASY, HARD, two_segments
from recorded_graphs import RecordedGraphs
from torch import nn

from clframe.errors import ConfigError, DataError
from clframe.exits import segment_runners
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.exits.row_buffers import HostCopy
from clframe.exits.segment_runners import GraphRunner, PlainRunner, SegmentRun
from clframe.exits.streaming import ExitServer


def test_results_have_the_type_of_the_scores_and_every_exit():
    """Shorter floating-point types than 32 bits do not have all numbers of exits."""
    dynamic = two_segments()
    rows = ActiveSamples(torch.zeros(2, 6), scores_nC=torch.ones(2, 3, dtype=torch.bfloat16))
    rows.exit_n, rows.done_n = torch.tensor([257, 1]), torch.tensor([False, True])
    runner = PlainRunner(dynamic)
    for segment, stops in ((0, [False, True]), (1, [True, True])):
        found = SegmentRun(rows, HostCopy(runner.pack(segment, rows)), torch.bfloat16).results()
        assert found[0].dtype == torch.bfloat16 and found[1:] == ([257, 1], stops)


def launched(runner, dynamic, x):
    """Run all segments without removing samples, and compare each one with the plain runner."""
    rows, plain = ActiveSamples(x), ActiveSamples(x)
    for segment in range(runner.segments):
        run, expected = runner.launch(segment, [rows]), PlainRunner(dynamic).launch(segment, [plain])
        (scores, *found), (expected_scores, *wanted) = run.results(), expected.results()
        assert found == wanted
        torch.testing.assert_close(scores, expected_scores)
        rows = plain = expected.rows  # in the order of the batch
    return scores


@pytest.mark.parametrize("replace", ["weight", "grow", "ensemble"])
def test_graphs_of_a_network_that_has_changed_are_not_used(replace, monkeypatch):
    monkeypatch.setattr(segment_runners, "WARM", 0)
    net = network("mlp", "cascade")
    confidence, thresholds = split(net, "margin", inputs(net, 33))
    dynamic = DynamicNetwork(net, ExitPolicy(measure=confidence, thresholds=thresholds))
    runner = GraphRunner(dynamic, max_batch=4, graphs=RecordedGraphs())
    x = inputs(net, 4)
    before = launched(runner, dynamic, x)
    net.load_state_dict(network("mlp", "cascade", seed=1).state_dict())  # written in place: the graphs read it
    after = launched(runner, dynamic, x)
    assert not torch.allclose(before, after) and runner._graphs[0].released == 0 and runner.eager == 0
    if replace == "weight":
        net.final.weight = nn.Parameter(net.final.weight + 1)
    elif replace == "grow":
        net.grow([6, 7])
    else:
        net.boosted = True
    found = launched(runner, dynamic, x)
    assert runner._graphs[0].released == 1 and runner.eager >= 1
    assert found.shape != after.shape or not torch.allclose(found, after)
    torch.testing.assert_close(launched(runner, dynamic, x), found)
    assert runner._graphs[0].released == 1 and runner.recorded == runner.segments


def test_graphs_are_recorded_for_each_device(monkeypatch):
    monkeypatch.setattr(segment_runners, "WARM", 0)
    dynamic = two_segments()
    runner = GraphRunner(dynamic, max_batch=2, graphs=RecordedGraphs())
    launched(runner, dynamic, torch.stack([EASY, HARD]))
    monkeypatch.setattr(segment_runners, "WARM", 1)
    assert runner._recorded(0, ActiveSamples(torch.zeros(2, 6)), 2) is not None
    assert runner._recorded(0, ActiveSamples(torch.zeros(2, 6, device="meta")), 2) is None


def test_a_runner_follows_another_ensemble_and_refuses_other_exits():
    net = network("mlp")
    dynamic = DynamicNetwork(net, ExitPolicy(thresholds=2.0, fallback="confident"))
    runner, x = PlainRunner(dynamic), inputs(net, 4)
    for _ in range(2):
        expected = reference(net, dynamic.policy, x)
        found = runner.launch(0, [ActiveSamples(x)]).results()
        assert found[1] == expected.exit_B.tolist()
        torch.testing.assert_close(found[0], expected.scores_BC)
        net.boosted = True  # every exit's logits are added to those before
    dynamic = two_segments()
    runner = PlainRunner(dynamic)
    dynamic.network.attach([])
    with pytest.raises(ConfigError, match=r"^runner: found other exits than before; make another runner and another ser"):
        runner.launch(0, [ActiveSamples(torch.zeros(2, 6))])


def test_batches_that_a_runner_does_not_record_are_refused():
    dynamic = two_segments()
    with pytest.raises(ConfigError, match=r"^runner: found a network on cpu; move it to a CUDA device, or use PlainRun"):
        GraphRunner(dynamic, max_batch=4)
    with pytest.raises(ConfigError, match=r"^runner: found max_batch=0; give at least 1$"):
        GraphRunner(dynamic, max_batch=0, graphs=RecordedGraphs())
    runner = GraphRunner(dynamic, max_batch=4, graphs=RecordedGraphs())
    with pytest.raises(ConfigError, match=r"^runner: found 5 samples; give 4 at most, or raise max_batch$"):
        runner.launch(0, [ActiveSamples(torch.zeros(2, 6)), ActiveSamples(torch.zeros(3, 6))])
    with pytest.raises(DataError, match=r"^runner: found no sample to record with; give a batch of at least one$"):
        runner.prepare(torch.zeros(0, 6))
    with pytest.raises(ConfigError, match=r"^server: found max_batch=5 and a runner for 4 samples; give both the same num"):
        ExitServer(dynamic, max_batch=5, runner=runner)
    assert ExitServer(dynamic, max_batch=4, runner=runner).max_batch == 4
