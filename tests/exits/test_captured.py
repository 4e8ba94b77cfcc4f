"""Dynamic inference as graphs: predictions of every sample equal those with all exits computed.

On a CPU a stand-in for CUDA graphs repeats the recorded operators, whatever the inputs of a later call decide.
"""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from exit_networks import Finer, assert_same, inputs, network, reference, split
from recorded_graphs import RecordedGraphs
from torch import nn

from clframe.errors import ConfigError, DataError
from clframe.exits import captured as module
from clframe.exits import captured_segments
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.captured import CapturedNetwork
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.exits.segment_runners import GraphRunner
from clframe.exits.segments import buckets_of, cheapest_removals, divide
from clframe.nn.backbones.stages import tap_of

MIXED = [
    ("cnn", "plain", "max_probability", "last", None), ("cnn", "cascade", "patience", "confident", None),
    ("masked", "geometric", "patience", "last", [1]), ("masked", "product", "max_probability", "confident", [0, 2]),
    ("mlp", "boosted", "patience", "last", []), ("mlp", "mean", "entropy", "confident", [1]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Record a segment at its first use: the stand-in repeats every later one."""
    monkeypatch.setattr(captured_segments, "WARM", 0)
    monkeypatch.setattr(module, "WARM", 0)


def captured(net, policy, *, exits=None, batch=9, removals=None) -> CapturedNetwork:
    return CapturedNetwork(
        DynamicNetwork(net, policy, exits=exits), graphs=RecordedGraphs(), batch=batch, removals=removals
    )


def policy_for(net, name="margin", fallback="last") -> ExitPolicy:
    confidence, thresholds = split(net, name, inputs(net, 33))
    return ExitPolicy(measure=confidence, thresholds=thresholds, fallback=fallback)


def check(runner, net, policy, sizes, exits=None) -> set[int]:
    """Compare predictions of fresh inputs of these sizes, and return the exits used."""
    used: set[int] = set()
    for size in sizes:
        x = inputs(net, size)
        found = runner(x)
        assert_same(found, reference(net, policy, x, exits))
        used |= set(found.exit_B.tolist())
    assert not runner.failure
    return used


@pytest.mark.parametrize(("kind", "variant", "name", "fallback", "removals"), MIXED)
def test_predictions_equal_those_with_all_exits_computed(kind, variant, name, fallback, removals):
    net = network(kind, variant)
    policy = policy_for(net, name, fallback)
    runner = captured(net, policy, removals=removals)
    assert len(check(runner, net, policy, [9, 9, 1, 5, 21])) > 1
    assert runner.recorded >= len(divide(runner.dynamic, removals))


@pytest.mark.slow
@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("variant", ["plain", "cascade", "boosted", "product", "product to the end", "mean", "geometric"])
@pytest.mark.parametrize("kind", ["cnn", "masked", "mlp"])
def test_every_ensemble_with_several_sets_of_removals(kind, variant, fallback):
    net = network(kind, variant)
    for name, some in (("gate", [[0], [2], [1, 2]]), ("patience", [[], [1], [0, 1, 2]])):
        policy = policy_for(net, name, fallback)
        for removals in some:
            check(captured(net, policy, removals=removals), net, policy, [9, 5, 1, 21])


def test_one_replay_serves_other_numbers_of_samples():
    net = network("mlp")
    policy = policy_for(net)
    runner = captured(net, policy, batch=32)
    runner.buckets = (4, 20, 32)
    check(runner, net, policy, [20, 17, 18, 19])
    assert [bucket for segment, bucket in runner._segments.recordings if segment == 0] == [20]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("threshold", "exit"), [(0.0, 0), (1.0, 3)])
def test_all_samples_may_stop_or_none(threshold, exit, batch):
    net = network("cnn")
    policy = ExitPolicy(thresholds=threshold)
    runner = captured(net, policy, batch=batch)
    assert check(runner, net, policy, [batch, 1, 2 * batch + 1]) == {exit}
    assert {segment for segment, _ in runner._segments.recordings} == set(range(exit + 1))


def test_an_empty_batch_gives_an_empty_prediction():
    net = network("mlp")
    runner = captured(net, ExitPolicy(thresholds=0.5))
    for _ in range(2):
        assert runner(inputs(net, 0)).scores_BC.shape == (0, 6)
        check(runner, net, runner.dynamic.policy, [3])


def test_padding_and_stopped_rows_never_reach_the_result():
    """Rows whose values are not a number do not matter; a sample's own do."""
    net = network("masked")
    policy = policy_for(net)
    runner = captured(net, policy, batch=8)
    runner(inputs(net, 8))
    for rows in runner._segments.inputs:
        for tensor in rows.carried():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    check(runner, net, policy, [5, 3, 8, 1])


def test_disabled_exits_stop_no_sample():
    net = network("cnn")
    policy = policy_for(net)
    assert check(captured(net, policy, exits=[1]), net, policy, [9, 9, 4], [1]) == {1, 3}


def test_exits_may_differ_in_type():
    net = network("mlp")
    net.ensemble = Finer()
    policy = policy_for(net)
    x = inputs(net, 9)
    found, wanted = captured(net, policy)(x), reference(net, policy, x)
    assert found.scores_BC.dtype == torch.float64
    assert found.exit_B.tolist() == wanted.exit_B.tolist()
    torch.testing.assert_close(found.scores_BC.float(), wanted.scores_BC.float())


def test_channels_last_is_kept_between_segments():
    net = network("cnn").to(memory_format=torch.channels_last)
    policy = policy_for(net)
    runner = captured(net, policy)
    x = inputs(net, 9).to(memory_format=torch.channels_last)
    assert_same(runner(x), reference(net, policy, x))
    tap = tap_of(runner._segments.inputs[1].value)
    assert tap.is_contiguous(memory_format=torch.channels_last) and not tap.is_contiguous()


def test_values_written_in_place_are_used_and_replaced_parameters_recorded_again():
    net = network("cnn")
    runner = captured(net, policy_for(net))
    check(runner, net, runner.dynamic.policy, [9])
    recorded = runner.recorded
    net.load_state_dict(network("cnn", seed=1).state_dict())
    check(runner, net, runner.dynamic.policy, [9])
    assert runner._graphs.released == 0
    net.grow([6, 7])
    assert runner(inputs(net, 9)).scores_BC.shape == (9, 8)
    check(runner, net, runner.dynamic.policy, [9])
    assert runner._graphs.released == 1 and runner.recorded > recorded
    net.heads[0].linear.weight = nn.Parameter(net.heads[0].linear.weight + 1)
    check(runner, net, runner.dynamic.policy, [9])
    net.boosted = True
    check(runner, net, runner.dynamic.policy, [9])
    assert runner._graphs.released == 3


@pytest.mark.parametrize(("kind", "variant", "name", "fallback", "removals"), MIXED)
def test_new_classes_are_recorded_for_every_ensemble(kind, variant, name, fallback, removals):
    net = network(kind, variant)
    policy = policy_for(net, name, fallback)
    runner = captured(net, policy, removals=removals)
    check(runner, net, policy, [9, 5])
    net.grow([6, 7])
    assert runner(inputs(net, 9)).scores_BC.shape == (9, 8)
    check(runner, net, policy, [9, 5, 1])
    assert runner._graphs.released == 1


def test_other_inputs_are_predicted_without_graphs(caplog):
    net = network("mlp")
    runner = captured(net, policy_for(net))
    check(runner, net, runner.dynamic.policy, [4])
    recorded = runner.recorded
    with caplog.at_level(logging.INFO, "clframe.exits.captured"):
        for _ in range(2):
            x = torch.randn(4, 3, 2, 2)
            assert_same(runner(x), reference(net, runner.dynamic.policy, x))
    assert runner.recorded == recorded
    assert caplog.messages == [
        "dynamic inference without CUDA graphs: inputs are torch.float32 of shape (3, 2, 2), recorded are "
        "torch.float32 of (12,)"
    ]


def test_a_segment_that_waits_for_the_device_runs_without_graphs(caplog):
    def waiting(exit, scores_BC, carried):
        return scores_BC.softmax(1).amax(1) * float(scores_BC.isfinite().any()), carried

    net = network("mlp")
    runner = captured(net, ExitPolicy(measure=waiting, thresholds=0.5))
    x = inputs(net, 9)
    with caplog.at_level(logging.INFO, "clframe.exits.captured"):
        for _ in range(2):
            assert_same(runner(x), reference(net, runner.dynamic.policy, x))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("dynamic inference without CUDA graphs: a segment cannot be recorded (aten::")


def test_training_mode_is_left_as_it_was():
    net = network("mlp")
    runner, x = captured(net, policy_for(net)), inputs(net, 9)
    net.train()
    found = runner(x)
    assert net.training and all(part.training for part in net.modules())
    assert_same(found, reference(net.eval(), runner.dynamic.policy, x))


def test_results_are_not_overwritten_by_the_next_call():
    net = network("mlp")
    runner = captured(net, policy_for(net))
    first = runner(inputs(net, 9))
    kept = first.scores_BC.clone()
    runner(inputs(net, 9))
    assert torch.equal(first.scores_BC, kept)


def test_removals_are_chosen_by_measured_times_and_change_no_prediction(monkeypatch):
    net = network("mlp")
    policy = policy_for(net)
    runner = captured(net, policy, batch=16)
    assert runner.memory == 0

    def free(runner, call):
        return 1.0  # however many samples: removing never pays

    monkeypatch.setattr(CapturedNetwork, "_time", free)
    assert runner.choose_removals(inputs(net, 16)) == ()
    check(runner, net, policy, [16, 3])
    monkeypatch.setattr(module, "cheapest_removals", lambda exits, alive, compute, remove: exits[1:])
    assert runner.choose_removals(inputs(net, 40)) == (1, 2)
    check(runner, net, policy, [16, 3])
    # Inputs of 12, taps of 8, 8 and scores of 6 with 4 bytes each; exits of 8 bytes; the results have a row more.
    assert runner.memory == 16 * 4 * (12 + 8 + 8) + 17 * (6 * 4 + 8)


def test_removals_are_not_chosen_without_samples_or_graphs():
    net = network("mlp")
    runner = captured(net, policy_for(net), removals=[2, 0])
    with pytest.raises(DataError, match=r"^captured: found no samples to choose removals by; give some like those to"):
        runner.choose_removals(inputs(net, 0))
    runner.failure = "cannot be recorded"
    assert runner.choose_removals(inputs(net, 3)) == (0, 2)


def test_the_cheapest_removals_are_those_of_all_combinations():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        alive = [10, *torch.randint(0, 11, (3,), generator=generator).sort(descending=True).values.tolist()]
        speed, price = (torch.rand(4, 2, generator=generator).tolist() for _ in range(2))

        def compute(segment, samples, speed=speed):
            return speed[segment][0] + speed[segment][1] * samples

        def remove(segment, samples, price=price):
            return 4 * price[segment][0] + price[segment][1]

        def total(removals, alive=alive, compute=compute, remove=remove):
            seconds, samples = 0.0, alive[0]
            for segment in range(4):
                if not samples:
                    break
                seconds += compute(segment, samples)
                if segment in removals:
                    seconds += remove(segment, samples)
                    samples = alive[segment + 1]
            return seconds

        every = itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4))
        found = cheapest_removals([0, 1, 2], alive, compute, remove)
        assert total(found) == pytest.approx(min(map(total, every)))


@pytest.mark.parametrize("parts", [8, 32])
def test_buckets_pad_by_a_part_of_the_batch_at_most(parts):
    for batch in (1, 2, 3, 8, 17, 256, 1000):
        buckets = buckets_of(batch, parts=parts)
        assert buckets[-1] == batch and buckets[0] == 1 and list(buckets) == sorted(set(buckets))
        assert len(buckets) <= parts + batch.bit_length()
        for below, above in itertools.pairwise(buckets):
            assert above - below <= max(-(-batch // parts), below)


def test_what_does_not_fit_is_one_line():
    net = network("mlp")
    dynamic = DynamicNetwork(net, ExitPolicy(thresholds=(0.5, 2.0, 0.5)))
    with pytest.raises(ConfigError, match=r"^removals: found exit 1, which cannot stop a sample; give some of 0, 2$"):
        CapturedNetwork(dynamic, graphs=RecordedGraphs(), removals=[1])
    with pytest.raises(ConfigError, match=r"^captured: found batch=0; give at least 1$"):
        CapturedNetwork(dynamic, graphs=RecordedGraphs(), batch=0)
    with pytest.raises(ConfigError, match=r"^captured: found a network on cpu; move it to a CUDA device, or use Dyn"):
        CapturedNetwork(dynamic)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "variant", "name", "fallback", "removals"), MIXED)
def test_on_a_gpu(kind, variant, name, fallback, removals, monkeypatch):
    monkeypatch.setattr(captured_segments, "WARM", 2)
    monkeypatch.setattr(module, "WARM", 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = network(kind, variant)
    policy = policy_for(net, name, fallback)
    dynamic = DynamicNetwork(net.cuda(), policy)
    runner, server = CapturedNetwork(dynamic, batch=33, removals=removals), GraphRunner(dynamic, max_batch=33)
    for size in (33, 33, 33, 33, 33, 7, 7, 7, 7, 1, 40):
        x = inputs(net, size).cuda()
        expected = reference(net, policy, x)
        assert_same(runner(x), expected)
        _, _, stops = server.launch(0, [ActiveSamples(x[:1]), ActiveSamples(x[1:33])]).results()
        if fallback == "last":
            assert stops == (expected.exit_B[:33] == 0).tolist()
    assert runner.recorded and server.recorded and not runner.failure and not server.failure
    runner.choose_removals(inputs(net, 33).cuda())
    for _ in range(4):
        x = inputs(net, 33).cuda()
        assert_same(runner(x), reference(net, policy, x))
    net.grow([6, 7])
    x = inputs(net, 33).cuda()
    assert_same(runner(x), reference(net, policy, x))
