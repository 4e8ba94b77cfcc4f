"""Asymmetric cross-entropy beside a memory, and label smoothing: the owners of the slot ``task``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from clframe.core import Batch, Experience, Step, StepContext, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.errors import ComposeError, ConfigError
from clframe.functional.losses import cross_entropy
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.types import Output
from clframe.seeding import generator_for
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import ER, ERACE, LabelSmoothing


def network(classes, exits=1):
    torch.manual_seed(0)
    heads = [("layer1", GrowingLinear(5)) for _ in range(exits - 1)]
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=5), exits=heads)
    net.grow(classes)
    return net


def step(net, y, classes, past, *, weight_B=None):
    part = TensorSamples(torch.zeros(1, 1, 2, 2), torch.zeros(1).long())
    now = StepContext(Experience(1, 3, tuple(classes), tuple(past), (), part), 0, 1, generator_for(0))
    batch = Batch(torch.rand(len(y), 1, 2, 2), torch.tensor(y), weight_B)
    return Step(batch, net(batch.x), now, net)


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("over, present", [("batch", [3, 5]), ("experience", [3, 4, 5])])
@pytest.mark.parametrize("rehearse, share", [("all", 0.5), ("past", 0.0)])
def test_new_samples_compete_among_classes_present_and_replayed_ones_among_all(over, present, rehearse, share, exits):
    ace, net = ERACE(over=over, rehearse=rehearse), network(range(6), exits)
    now = step(net, [3, 5, 3, 0, 2], classes=(3, 4, 5), past=(0, 1, 2))
    loss_K = ace.task_loss(now, ace.before_experience(net, now.context, ace.init_state(net)))
    assert loss_K.shape == (exits,)
    targets = torch.tensor([present.index(c) for c in (3, 5, 3)])
    for k, logits in enumerate(now.output.logits):
        expected = F.cross_entropy(logits[:3, present], targets)
        expected = expected + (1 - share) * F.cross_entropy(logits[3:], now.batch.y[3:])
        expected = expected + share * F.cross_entropy(logits[:3], now.batch.y[:3])
        assert torch.allclose(loss_K[k], expected, rtol=1e-5)


def test_the_first_experience_and_a_lone_class_are_plain():
    ace, net = ERACE(), network(range(2))
    now = step(net, [0, 1, 1], classes=(0, 1), past=())
    state = ace.before_experience(net, now.context, ace.init_state(net))
    assert torch.equal(ace.task_loss(now, state), cross_entropy(now.output.logits, now.batch.y))
    ace, net = ERACE(rehearse="past"), network(range(3))
    now = step(net, [2], classes=(2,), past=(0, 1))  # one sample of one class: nothing to tell it from
    assert ace.task_loss(now, ace.before_experience(net, now.context, ace.init_state(net))).tolist() == [0.0]


def test_weights_of_replayed_samples_scale_their_term():
    ace, net = ERACE(rehearse="past"), network(range(4))
    weights = torch.tensor([1.0, 1.0, 0.25, 0.25])
    now = step(net, [2, 3, 0, 1], classes=(2, 3), past=(0, 1), weight_B=weights)
    logits, y = now.output.last, now.batch.y
    expected = F.cross_entropy(logits[:2, 2:], y[:2] - 2) + 0.25 * F.cross_entropy(logits[2:], y[2:])
    assert torch.allclose(ace.task_loss(now, ace.before_experience(net, now.context, ace.init_state(net)))[0], expected, rtol=1e-5)


def test_it_needs_a_memory():
    with pytest.raises(ComposeError, match="'er_ace' needs a memory; add one, as in 'er_ace \\+ er'"):
        compose(ERACE()).check_needs()
    compose(ERACE(), ER()).check_needs()


# --- label smoothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothed_targets_at_every_exit(smoothing):
    net = network(range(4), exits=3)
    now = step(net, [0, 3, 3], classes=(2, 3), past=(0, 1))
    loss_K = LabelSmoothing(smoothing=smoothing).task_loss(now, {})
    for k, logits in enumerate(now.output.logits):
        assert torch.allclose(loss_K[k], F.cross_entropy(logits, now.batch.y, label_smoothing=smoothing), rtol=1e-5)


def test_smoothing_ignores_gaps_and_one_class_costs_nothing():
    net = network([0, 2])
    now = step(net, [0, 2], classes=(0, 2), past=())
    dense = F.cross_entropy(now.output.last[:, [0, 2]], torch.tensor([0, 1]), label_smoothing=0.1)
    assert torch.allclose(LabelSmoothing().task_loss(now, {})[0], dense, rtol=1e-5)
    alone = Step(Batch(torch.zeros(1), torch.tensor([0])), Output((torch.tensor([[3.0]]),)), now.context, net)
    assert LabelSmoothing().task_loss(alone, {}).tolist() == [0.0]


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_impossible_smoothing(smoothing):
    with pytest.raises(ConfigError, match=r"components.label_smoothing.smoothing: found"):
        LabelSmoothing(smoothing=smoothing)


# --- runs ------------------------------------------------------------------------------------------------------------


def run(expression, *, epochs=6):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(24)
    centers = 3 * torch.randn(6, 1, 2, 2, generator=generator)
    data = TensorSamples(centers[y] + 0.3 * torch.randn(len(y), 1, 2, 2, generator=generator), y)
    benchmark = class_incremental(Source("blobs", data, data, classes=6), experiences=3, order="sorted")
    torch.manual_seed(2)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=16))
    module = ContinualModule(net, parse(expression), optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
    loop = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=8, train_epochs=epochs, evaluator=None)
    for experience in benchmark.avalanche.train_stream:
        loop.train(experience)
    with torch.no_grad():
        logits = [net.eval()(part.x).last for part in benchmark.test]
    hits = [float((l_BC.argmax(1) == p.y).float().mean()) for l_BC, p in zip(logits, benchmark.test, strict=True)]
    return hits, float(torch.cat(logits).softmax(1).amax(1).mean())


def test_it_learns_new_classes_and_keeps_old_ones():
    assert sum(run("naive")[0][:2]) < 0.7
    assert min(run("er(memory=30) + er_ace")[0]) > 0.8
    assert min(run("er(memory=30, replay='concatenate') + er_ace(over='experience')")[0]) > 0.8


def test_smoothing_lowers_confidence():
    (accurate, sure), (smooth, unsure) = run("er(memory=30)"), run("er(memory=30) + label_smoothing(smoothing=0.3)")
    assert min(accurate) > 0.8 and min(smooth) > 0.8 and unsure < sure - 0.1
