"""Dynamic inference: predictions equal those with all exits computed, and no unneeded exit is computed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from exit_networks import (
    CLASSES,
    PAIRS,
    UNFITTED,
    VARIANTS,
    Finer,
    Pooled,
    assert_same,
    inputs,
    measure,
    network,
    reference,
    scores,
    split,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clframe.errors import ConfigError, UnknownNameError
from clframe.exits.decisions import Prediction
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.ensembles import Mean
from clframe.exits.policies import CONFIDENCE_MEASURES, ExitPolicy, max_probability
from clframe.nn import GrowingLinear, Head, Network
from clframe.nn.backbones import Backbone
from clframe.nn.backbones.stages import tap_of

BATCHES = (1, 2, 7, 33)


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize(("variant", "name"), PAIRS)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "masked"])
def test_predictions_equal_those_with_all_exits_computed(kind, variant, name, fallback):
    net = network(kind, variant)
    x = inputs(net, sum(BATCHES))
    confidence, thresholds = split(net, name, x)
    policy = ExitPolicy(measure=confidence, thresholds=thresholds, fallback=fallback)
    expected = reference(net, policy, x)
    assert len(expected.exit_B.unique()) > 1
    for compact in (0.0, 0.4, 2.0):
        dynamic = DynamicNetwork(net, policy, compact=compact)
        assert_same(dynamic(x), expected)
        parts = [dynamic(part) for part in x.split(BATCHES)]
        assert_same(Prediction(*(torch.cat(values) for values in zip(*parts, strict=True))), expected)
    order = torch.randperm(len(x))
    assert_same(dynamic(x[order]), Prediction(expected.scores_BC[order], expected.exit_B[order]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fallback", ["last", "confident"])
def test_one_threshold_serves_all_exits_and_some_may_be_disabled(variant, fallback):
    net = network("cnn", variant)
    x = inputs(net, 33)
    confidence_B = torch.cat([max_probability(0, scores_BC, ())[0] for scores_BC in scores(net, x)[:3:2]])
    policy = ExitPolicy(thresholds=confidence_B.median().item() + 1e-3, fallback=fallback)
    for exits in (None, [], [1], [0, 2], [2, 3]):
        expected = reference(net, policy, x, exits)
        assert_same(DynamicNetwork(net, policy, exits=exits)(x), expected)
        assert set(expected.exit_B.tolist()) <= {*(range(4) if exits is None else exits), 3}
    by_name = DynamicNetwork(net, policy, exits=["block1", "hidden"])(x)
    assert_same(by_name, reference(net, policy, x, [0, 2]))
    assert {0, 2} <= set(by_name.exit_B.tolist())


@pytest.mark.parametrize("name", [*UNFITTED, "gate"])
@pytest.mark.parametrize("classes", [[0], [2], [0, 1]])
def test_few_classes_are_no_special_case(name, classes):
    net = network("mlp", classes=classes)
    x = inputs(net, 7)
    policy = ExitPolicy(measure=measure(name), thresholds=0.55)
    answer = DynamicNetwork(net, policy)(x)
    assert_same(answer, reference(net, policy, x))
    assert not answer.scores_BC.isnan().any()
    if len(classes) == 1 and name in ("max_probability", "entropy", "margin"):
        assert answer.exit_B.tolist() == [0] * 7


@pytest.mark.parametrize("name", [*UNFITTED, "gate"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "masked"])
def test_threshold_zero_is_the_first_exit(kind, name):
    net = network(kind)
    x = inputs(net, 7)
    answer = DynamicNetwork(net, ExitPolicy(measure=measure(name), thresholds=0.0))(x)
    assert answer.exit_B.tolist() == [0] * 7
    assert torch.equal(answer.scores_BC, scores(net, x)[0])
    assert [head.calls for head in net.heads if isinstance(head, Pooled)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("variant", "name"), [pair for pair in PAIRS if pair[0] in ("plain", "cascade", "product", "geometric")]
)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "masked"])
def test_a_threshold_above_one_is_the_bare_backbone_bit_for_bit(kind, name, variant):
    net = network(kind, variant)
    x = inputs(net, 7)
    dynamic = DynamicNetwork(net, ExitPolicy(measure=measure(name), thresholds=1.0001))
    answer = dynamic(x)
    value = x
    for stage in net.backbone.stages:
        value = stage(value)
    assert torch.equal(answer.scores_BC, net.final(value))
    assert answer.exit_B.tolist() == [3] * 7
    assert dynamic.computed_exits == (3,)
    assert [head.calls for head in net.heads if isinstance(head, Pooled)] == [0, 0, 0]


def test_unused_heads_are_not_computed():
    policy = ExitPolicy(thresholds=(2.0, 0.5, 2.0))
    computed = {variant: DynamicNetwork(network(variant=variant), policy).computed_exits for variant in VARIANTS}
    everything = (0, 1, 2, 3)
    assert computed == {
        "plain": (1, 3), "cascade": (0, 1, 3), "boosted": everything, "product": (0, 1, 3),
        "product to the end": everything, "mean": everything, "geometric": (0, 1, 3),
    }  # fmt: skip
    assert DynamicNetwork(network(), policy).stopping_exits == (1,)
    fallback = ExitPolicy(thresholds=(2.0, 0.5, 2.0), fallback="confident")
    assert DynamicNetwork(network(), fallback, exits=[0, 1]).computed_exits == (0, 1, 3)
    assert DynamicNetwork(network(), fallback).computed_exits == everything
    assert DynamicNetwork(network(), fallback).stopping_exits == (1,)


class Counting(nn.Module):
    def __init__(self, stage: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.stage, self.seen = stage, seen

    def forward(self, value):
        self.seen.append(len(tap_of(value)))
        return self.stage(value)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "masked"])
@pytest.mark.parametrize("batch", BATCHES)
def test_stages_process_just_the_samples_that_have_not_left(kind, batch):
    net = network(kind, "cascade")
    x = inputs(net, batch)
    _, thresholds = split(net, "margin", inputs(net, 33))
    dynamic = DynamicNetwork(net, ExitPolicy(measure=CONFIDENCE_MEASURES.get("margin"), thresholds=thresholds), compact=0.0)
    seen: list[int] = []
    net.backbone.stages = nn.ModuleList(Counting(stage, seen) for stage in net.backbone.stages)
    exit_B = dynamic(x).exit_B
    stage_of = [stage for stage, exits in enumerate(net.exits_at) for _ in exits]
    depth_B = torch.tensor([stage_of[exit] for exit in exit_B.tolist()])
    expected = [int((depth_B >= stage).sum()) for stage in range(len(net.exits_at))]
    assert seen == [count for count in expected if count]


def test_samples_are_carried_along_until_leaving_pays():
    net = network("mlp")
    x = inputs(net, 10)
    share = [0.4, 0.5, 1.0]  # finished at exits 0 and 1 of 3; exits 1 and 2 share a tap

    def planned(exit, scores_BC, carried):
        """Confident in the first rows of the input; the rows' numbers are carried."""
        row_B = carried[0] if carried else torch.arange(len(scores_BC))
        return (row_B < 10 * share[exit]).float(), (row_B,)

    seen: list[int] = []
    net.backbone.stages = nn.ModuleList(Counting(stage, seen) for stage in net.backbone.stages)
    policy = ExitPolicy(measure=planned, thresholds=(0.5, 0.5, 2.0))
    counts = {}
    for compact in (0.0, 0.4, 0.41, 0.5, 0.51, 2.0):
        seen.clear()
        assert DynamicNetwork(net, policy, compact=compact)(x).exit_B.tolist() == [0] * 4 + [1] + [3] * 5
        counts[compact] = list(seen)
    assert counts == {
        0.0: [10, 6, 5], 0.4: [10, 6, 6], 0.41: [10, 10, 5], 0.5: [10, 10, 5], 0.51: [10, 10, 10], 2.0: [10, 10, 10],
    }  # fmt: skip


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("compact", [0.0, 2.0])
@pytest.mark.parametrize("leaving", [0, 1, 6, 7])
def test_all_none_or_all_but_one_may_stop_together(leaving, compact, fallback):
    net = network("masked", "cascade")
    x = inputs(net, 7)

    def planned(exit, scores_BC, carried):
        row_B = carried[0] if carried else torch.arange(len(scores_BC))
        return (row_B < leaving).float() if exit == 1 else torch.full((len(row_B),), 0.1 * exit), (row_B,)

    policy = ExitPolicy(measure=planned, thresholds=0.9, fallback=fallback)
    answer = DynamicNetwork(net, policy, compact=compact)(x)
    assert answer.exit_B.tolist() == [1] * leaving + [3] * (7 - leaving)
    assert_same(answer, reference(net, policy, x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_an_empty_batch_gives_an_empty_prediction(variant, fallback, threshold):
    net = network("cnn", variant)
    answer = DynamicNetwork(net, ExitPolicy(thresholds=threshold, fallback=fallback))(inputs(net, 0))
    assert answer.scores_BC.shape == (0, 6)
    assert answer.exit_B.shape == (0,)
    assert answer.exit_B.dtype == torch.long


class Syncs(TorchDispatchMode):
    """Counts the operators that synchronize the host with the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "masked_select", "_unique2"):
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("variant", "name"), PAIRS)
@pytest.mark.parametrize("compact", [0.0, 0.5])
def test_the_host_synchronizes_once_at_each_stopping_exit(name, compact, variant):
    net = network("cnn", variant)
    x = inputs(net, 33)
    confidence, thresholds = split(net, name, x)
    policy = ExitPolicy(measure=confidence, thresholds=(*thresholds[:2], 2.0), fallback="confident")
    dynamic = DynamicNetwork(net, policy, compact=compact)
    assert dynamic.stopping_exits == (0, 1)
    with Syncs() as syncs:
        exit_B = dynamic(x).exit_B
    assert {1, 3} & set(exit_B.tolist())
    assert syncs.calls == {"nonzero": 2}


def test_taps_keep_channels_last_when_samples_are_removed():
    net = network("cnn").to(memory_format=torch.channels_last)
    x = inputs(net, 33).to(memory_format=torch.channels_last)
    seen: list[bool] = []

    class Watching(Counting):
        def forward(self, value):
            self.seen.append(value.is_contiguous(memory_format=torch.channels_last))
            return self.stage(value)

    net.backbone.stages[1] = Watching(net.backbone.stages[1], seen)
    policy = ExitPolicy(thresholds=split(net, "margin", x)[1], measure=CONFIDENCE_MEASURES.get("margin"))
    expected = reference(net, policy, x)
    assert 0 < (expected.exit_B == 0).sum() < 33
    seen.clear()
    assert_same(DynamicNetwork(net, policy, compact=0.0)(x), expected)
    assert seen == [True]


def test_it_runs_in_evaluation_mode_and_restores_the_mode():
    torch.manual_seed(0)
    stages = [("one", nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), (6,)), ("two", nn.Linear(6, 6), (6,))]
    net = Network(Backbone(stages, input_shape=(4,)), exits=[("one", GrowingLinear(6))])
    net.grow([0, 1, 2])
    x = torch.randn(9, 4)
    net.train()
    net.freeze_trunk()
    before = {name: part.training for name, part in net.named_modules()}
    policy = ExitPolicy(thresholds=0.5)
    answer = DynamicNetwork(net, policy)(x)
    assert {name: part.training for name, part in net.named_modules()} == before
    assert net.training and not net.backbone.training
    assert not answer.scores_BC.requires_grad
    net.unfreeze_trunk()
    mean = net.backbone.stages[0][1].running_mean.clone()
    assert_same(DynamicNetwork(net, policy)(x), answer)
    assert torch.equal(net.backbone.stages[0][1].running_mean, mean)
    assert_same(answer, reference(net.eval(), policy, x))


def test_neither_input_nor_network_is_written_to():
    net = network("mlp", "geometric")
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    x = inputs(net, 33)
    before = x.clone()
    dynamic = DynamicNetwork(net, ExitPolicy(thresholds=0.6, fallback="confident"), compact=0.0)
    first = dynamic(x)
    scores_BC = first.scores_BC.clone()
    dynamic(inputs(net, 33))
    assert torch.equal(x, before)
    assert torch.equal(first.scores_BC, scores_BC)
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())


def test_predictions_never_overwrite_the_input():
    class AsItIs(Head):
        def grow(self, classes):
            return False

        def forward(self, features, previous_BC=None):
            return features

    net = Network(Backbone([("in", nn.Identity(), (6,)), ("out", nn.Linear(6, 6), (6,))], input_shape=(6,)),
                  exits=[("in", AsItIs())]).eval()  # fmt: skip
    net.grow(range(6))
    x = 3 * torch.randn(33, 6)
    before = x.clone()
    answer = DynamicNetwork(net, ExitPolicy(thresholds=max_probability(0, x, ())[0].median().item()), compact=0.0)(x)
    assert answer.exit_B.unique().tolist() == [0, 1]
    assert torch.equal(x, before)


def test_it_follows_a_network_that_grows():
    net = network("mlp")
    dynamic = DynamicNetwork(net, ExitPolicy(thresholds=0.7))
    net.grow([6, 7])
    x = inputs(net, 33)
    assert dynamic(x).scores_BC.shape == (33, 8)
    assert_same(dynamic(x), reference(net, dynamic.policy, x))


def test_it_follows_a_network_whose_exits_are_replaced():
    net = network("mlp")
    dynamic, x = DynamicNetwork(net, ExitPolicy(thresholds=0.5)), inputs(net, 33)
    dynamic(x)
    for heads in ([Pooled(8, True), Pooled(8, True), Pooled(8, True)], [Pooled(8, False)]):
        net.attach([("layer2", head) for head in heads])
        net.grow(CLASSES)
        net.eval()
        assert_same(dynamic(x), reference(net, dynamic.policy, x))
    net.boosted = True
    assert_same(dynamic(x), reference(net, dynamic.policy, x))
    net.ensemble = Mean(2, final="member")
    assert_same(dynamic(x), reference(net, dynamic.policy, x))


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("compact", [0.0, 2.0])
def test_exits_may_differ_in_type(compact, fallback):
    net = network("mlp")
    net.ensemble = Finer()
    x = inputs(net, 33)
    policy = ExitPolicy(measure=CONFIDENCE_MEASURES.get("margin"), thresholds=split(net, "margin", x)[1], fallback=fallback)
    expected = reference(net, policy, x)
    assert {0, 1} <= set(expected.exit_B.tolist())
    found = DynamicNetwork(net, policy, compact=compact)(x)
    assert found.scores_BC.dtype == expected.scores_BC.dtype == torch.float64
    # Of doubles, but computed in float32: the tolerance is that of float32.
    assert_same(*(Prediction(p.scores_BC.float(), p.exit_B) for p in (found, expected)))


def test_what_does_not_fit_is_one_line():
    net = network("mlp")
    with pytest.raises(ConfigError, match=r"^policy: found 2 thresholds for 4 exits; give one, or one for each exit but the last$"):
        DynamicNetwork(net, ExitPolicy(thresholds=(0.5, 0.5)))
    with pytest.raises(ConfigError, match=r"^dynamic: found exit 4; give 0 to 3$"):
        DynamicNetwork(net, ExitPolicy(thresholds=0.5), exits=[4])
    with pytest.raises(UnknownNameError, match=r"unknown exit 'layer3'; did you mean 'layer"):
        DynamicNetwork(net, ExitPolicy(thresholds=0.5), exits=["layer3"])
    for compact in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"^dynamic: found compact=.*; give a share of 0 or more$"):
            DynamicNetwork(net, ExitPolicy(thresholds=0.5), compact=compact)
