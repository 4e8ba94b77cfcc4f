"""What the components do to a run, checked on their own states and batches."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import TensorSamples
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.types import Output
from clframe.seeding import generator_for
from strategies import ER, Cumulative, Joint, LwF


def samples(classes, per_class):
    y = torch.tensor([c for c in classes for _ in range(per_class)])
    x = torch.stack([torch.full((1, 2, 2), float(c)) + i / 1000 for i, c in enumerate(y.tolist())])
    return TensorSamples(x, y, mean=(1.0,), std=(2.0,))


def context(index, classes, past, *, per_class=9, seed=0):
    experience = Experience(index, 5, tuple(classes), tuple(past), (), samples(classes, per_class))
    return StepContext(experience, 0, 1, generator_for(seed, index))


def network(classes=4, exits=()):
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=5), exits=exits)
    net.grow(range(classes))
    return net


@pytest.mark.parametrize("memory", [6, 7, 20, 1000])
def test_memory_is_balanced_full_and_keeps_old_samples(memory):
    er, net = ER(memory=memory), network()
    state, past = er.init_state(net), ()
    for index, classes in enumerate([(0, 1), (2,), (3, 4, 5)]):
        before = state
        state = er.after_experience(net, context(index, classes, past), state)
        past = (*past, *classes)
        counts = torch.bincount(state["y"], minlength=len(past))
        room = memory // len(past)
        assert all(min(room, 9) <= n <= min(room + 1, 9) for n in counts.tolist())
        assert len(state["y"]) == min(memory, 9 * len(past)) == len(state["x"])
        assert torch.equal(state["x"].floor().flatten(1)[:, 0].long(), state["y"])
        if before["x"] is not None:
            old = {float(v) for v in before["x"][:, 0, 0, 0]}
            kept = {float(v) for v in state["x"][:, 0, 0, 0][state["y"] < min(classes)]}
            assert kept <= old


def test_a_class_met_again_keeps_samples_of_both_experiences():
    er, net = ER(memory=8), network()
    state = er.after_experience(net, context(0, (0, 1), ()), er.init_state(net))
    again = context(1, (0, 1), (0, 1), seed=5)
    again.experience.samples.x.add_(0.5)
    state = er.after_experience(net, again, state)
    late = (state["x"][:, 0, 0, 0] % 1) >= 0.5
    assert [int((late & (state["y"] == c)).sum()) for c in (0, 1)] == [2, 2]
    assert [int((~late & (state["y"] == c)).sum()) for c in (0, 1)] == [2, 2]


@pytest.mark.parametrize("ratio, size, replayed", [(1.0, 4, 4), (0.5, 3, 2), (2.0, 1, 2), (0.1, 1, 1)])
def test_replay_joins_the_batch_normalized(ratio, size, replayed):
    er, net = ER(memory=10, ratio=ratio), network()
    state = er.after_experience(net, context(0, (0, 1), ()), er.init_state(net))
    now = context(1, (2,), (0, 1))
    x, y = now.experience.samples.prepare(now.experience.samples.x[:size]), now.experience.samples.y[:size]
    joined = er.make_batch(Batch(x, y), now, state, net)
    assert torch.equal(joined.x[:size], x) and torch.equal(joined.y[:size], y)
    assert len(joined.y) == size + replayed and joined.weight_B is None
    assert set(joined.y[size:].tolist()) <= {0, 1}
    assert torch.equal((joined.x[size:, 0, 0, 0] * 2 + 1).floor().long(), joined.y[size:])


def test_no_memory_no_replay():
    er, net = ER(), network()
    batch = Batch(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    assert er.make_batch(batch, context(0, (0, 1), ()), er.init_state(net), net) is batch


def test_scale_weighs_replayed_samples():
    er, net = ER(memory=4, scale=0.25), network()
    state = er.after_experience(net, context(0, (0, 1), ()), er.init_state(net))
    joined = er.make_batch(Batch(torch.zeros(3, 1, 2, 2), torch.zeros(3).long()), context(1, (2,), (0, 1)), state, net)
    assert joined.weight_B.tolist() == [1.0] * 3 + [0.25] * 3


def test_er_refuses_a_memory_smaller_than_the_classes():
    ER(memory=10).check(classes=10)
    with pytest.raises(ConfigError, match=r"components.er.memory: found 9 for 10 classes; give at least 10"):
        ER(memory=9).check(classes=10)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: ER(memory=0), "components.er.memory"),
        (lambda: ER(ratio=0.0), "components.er.ratio"),
        (lambda: ER(ratio=math.nan), "components.er.ratio"),
        (lambda: ER(scale=-1.0), "components.er.scale"),
        (lambda: LwF(alpha=-1.0), "components.lwf.alpha"),
        (lambda: LwF(alpha=math.nan), "components.lwf.alpha"),
        (lambda: LwF(temperature=0.0), "components.lwf.temperature"),
    ],
)
def test_impossible_options(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


@pytest.mark.parametrize("exits", [0, 2])
def test_lwf_distils_from_the_model_as_it_was(exits):
    taps = [("layer1", GrowingLinear(5)) for _ in range(exits)]
    net, lwf = network(2, taps), LwF(alpha=3.0, temperature=2.0)
    x = torch.randn(4, 1, 2, 2)
    assert (
        lwf.losses(Step(Batch(x, torch.zeros(4).long()), net(x), context(0, (0, 1), ()), net), lwf.init_state(net))
        == {}
    )
    state = lwf.after_experience(net, context(0, (0, 1), ()), lwf.init_state(net))
    net.grow(range(3))
    before = net(x)
    step = Step(Batch(x, torch.zeros(4).long()), before, context(1, (2,), (0, 1)), net)
    term = lwf.losses(step, state)["distill"]
    assert term.shape == (exits + 1,) and term.abs().max().item() < 1e-6
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = net(x)
    term = lwf.losses(Step(step.batch, after, step.context, net), state)["distill"]
    for k in range(exits + 1):
        old = (before.logits[k][:, :2] / 2).softmax(1)
        new = (after.logits[k][:, :2] / 2).softmax(1)
        expected = 3.0 * 4 * (old * (old.log() - new.log())).sum(1).mean()
        assert torch.allclose(term[k], expected, rtol=1e-4)


def test_lwf_teacher_stays_as_it_was_and_learns_each_experience_once():
    net, lwf = network(2), LwF()
    state = lwf.after_experience(net, context(0, (0, 1), ()), lwf.init_state(net))
    weights = [p.clone() for p in state["teacher"].parameters()]
    net.grow(range(3))
    for parameter in net.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(weights, state["teacher"].parameters(), strict=True))
    assert lwf.after_experience(net, context(1, (2,), (0, 1)), state)["groups"] == ((0, 1), (2,))


def test_sources():
    assert [list(Cumulative().training_experiences(i, 3)) for i in range(3)] == [[0], [0, 1], [0, 1, 2]]
    assert [list(Joint().training_experiences(i, 3)) for i in range(3)] == [[0, 1, 2], [], []]
    assert ER().training_experiences(2, 3) == (2,)


def test_decisions_default_to_the_last_exit():
    first, last = torch.zeros(1, 2), torch.ones(1, 2)
    assert ER().predict(Output((first, last)), {}) is last
