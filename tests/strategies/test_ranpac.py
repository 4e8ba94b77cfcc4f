"""RanPAC: ridge regression on random features, against the regression on all data at once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from clframe.core import Experience, StepContext
from clframe.data import SOURCES, TensorSamples, class_incremental
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.types import Output
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import RanPAC

SMALL = RanPAC(projection=16, ridges=(0.1,))


def network(*, exits=1):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=6), exits=[("layer1", GrowingLinear(6))] * (exits - 1))
    net.grow(range(4))
    return net


def data(classes, per_class, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([c for _ in range(per_class) for c in classes])
    return TensorSamples(torch.randn(len(y), 1, 2, 2, generator=generator) + y.reshape(-1, 1, 1, 1), y)


def learnt(component, net, parts, state=None, *, seed=0):
    state = component.init_state(net) if state is None else state
    for index, part in enumerate(parts):
        experience = Experience(index, 3, tuple(part.y.unique().tolist()), (), (), part)
        state = component.after_experience(net, StepContext(experience, 0, 1, generator_for(seed, index)), state)
    return state


@pytest.mark.parametrize("exits", [1, 3])
def test_every_exit_answers_by_the_regression_on_all_data_at_once(exits):
    net, parts = network(exits=exits), [data((0, 1), 20), data((3, 0), 300, seed=1)]
    state = learnt(SMALL, net, parts)
    x, y, test = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), torch.randn(5, 1, 2, 2)
    with torch.no_grad():
        seen, asked = net(x, taps=net.exit_taps), net(test, taps=net.exit_taps)
    answers = SMALL.adjust_logits(asked, state)
    for exit, tap in enumerate(net.exit_taps):
        sums = state["exits"][exit]
        h = (seen.taps[tap] @ sums["projection"]).clamp(min=0).double()
        targets = torch.nn.functional.one_hot(y, 4).double()
        torch.testing.assert_close(sums["gram"], h.T @ h, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums["cross"], h.T @ targets, rtol=1e-5, atol=1e-4)
        weight = torch.linalg.solve(h.T @ h + 0.1 * torch.eye(16).double(), h.T @ targets)
        expected = (asked.taps[tap] @ sums["projection"]).clamp(min=0).double() @ weight
        kept = [0, 1, 3]
        torch.testing.assert_close(answers.logits[exit][:, kept].double(), expected[:, kept], rtol=1e-3, atol=1e-3)
        assert answers.logits[exit][:, 2].max() == -torch.inf
    assert state["count"].tolist() == [320, 20, 0, 300]


def test_the_order_of_experiences_changes_nothing():
    net, parts = network(), [data((0, 1), 20), data((2,), 7, seed=1), data((3, 0), 11, seed=2)]
    one = learnt(SMALL, net, parts)
    start = {**SMALL.init_state(net), "exits": [{**one["exits"][0], "gram": torch.zeros(16, 16).double(), "cross": torch.zeros(16, 0).double()}]}
    other = learnt(SMALL, net, parts[::-1], start)
    for key in ("gram", "cross"):
        # Features are single precision: a batch of another size may round them by a few units in the last place.
        torch.testing.assert_close(one["exits"][0][key], other["exits"][0][key], rtol=1e-5, atol=1e-4)


def test_the_projection_is_drawn_once_from_the_runs_seed():
    net, parts = network(), [data((0, 1), 9), data((2, 3), 9)]
    first, both = learnt(SMALL, net, parts[:1]), learnt(SMALL, net, parts)
    assert torch.equal(first["exits"][0]["projection"], both["exits"][0]["projection"])
    other = learnt(SMALL, net, parts, seed=1)["exits"][0]["projection"]
    assert not torch.equal(other, first["exits"][0]["projection"])
    many = learnt(replace(SMALL, projection=4000), net, parts[:1])["exits"][0]["projection"]
    assert many.shape == (6, 4000) and abs(float(many.mean())) < 0.05 and abs(float(many.std()) - 1) < 0.05


def test_the_ridge_is_the_one_with_the_least_error_on_samples_held_out():
    """Pure noise wants the strongest ridge; targets that are linear in the features the weakest."""
    generator = torch.Generator().manual_seed(0)
    component = RanPAC(projection=40, ridges=(1e-6, 1.0, 1e6))
    y = torch.randint(2, (60,), generator=generator)
    noise = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    assert component._select_ridge(noise, y, 2, before=1.0) == 1e6
    linear = 0.01 * noise.clone()
    linear[:, 0], linear[:, 1] = y, 1 - y
    assert component._select_ridge(linear[:, :2], y, 2, before=1.0) == 1e-6
    assert component._select_ridge(noise[:1], y[:1], 2, before=7.0) == 7.0
    # Of two samples one is held out, however large the share: one that looks like the other class wants no prediction.
    most = RanPAC(projection=4, ridges=(1e-6, 1e6), held_out=0.9)
    same = torch.ones(2, 4, dtype=torch.float64)
    assert most._select_ridge(same, torch.tensor([0, 1]), 2, before=1.0) == 1e6


def test_choosing_leaves_the_sums_alone():
    net, parts = network(), [data((0, 1), 30), data((2, 3), 30, seed=1)]
    one, chosen = learnt(SMALL, net, parts), learnt(replace(SMALL, ridges=(1e-3, 1.0, 1e3), held_out=0.5), net, parts)
    torch.testing.assert_close(one["exits"][0]["gram"], chosen["exits"][0]["gram"], rtol=1e-12, atol=1e-9)
    assert chosen["exits"][0]["ridge"] in (1e-3, 1.0, 1e3) and one["exits"][0]["ridge"] == 0.1


def test_an_advance_leaves_the_state_it_was_given_as_it_was():
    net, parts = network(), [data((0, 1), 9), data((2, 3), 9)]
    half = learnt(SMALL, net, parts[:1])
    before = half["exits"][0]["gram"].clone()
    learnt(SMALL, net, parts[1:], half)
    assert torch.equal(half["exits"][0]["gram"], before)


def test_logits_until_there_is_a_regression_and_a_checkpoint_between():
    net, parts = network(exits=3), [data((0, 1), 5), data((2, 3), 5)]
    output = Output((torch.ones(2, 4),), {"layer2": torch.ones(2, 6)})
    assert all(a is b for a, b in zip(SMALL.adjust_logits(output, SMALL.init_state(net)).logits, output.logits, strict=True))
    half = learnt(SMALL, net, parts[:1])
    one, other = (learnt(SMALL, net, parts[1:], state) for state in (half, decode(encode(half), net)))
    for a, b in zip(one["exits"], other["exits"], strict=True):
        assert torch.equal(a["weight"], b["weight"]) and a["ridge"] == b["ridge"]


def test_one_sample():
    net = network()
    state = learnt(RanPAC(projection=16), net, [data((1,), 1)])
    scores = SMALL.adjust_logits(net(torch.randn(3, 1, 2, 2), taps=net.exit_taps), state).last
    assert scores.argmax(1).tolist() == [1, 1, 1] and state["exits"][0]["ridge"] == 1.0


@pytest.mark.parametrize(
    "options, key",
    [({"projection": 0}, "projection"), ({"ridges": ()}, "ridges"), ({"ridges": (0.0,)}, "ridges"), ({"held_out": 1.0}, "held_out")],
)
def test_impossible_options(options, key):
    with pytest.raises(ConfigError, match=rf"components\.ranpac\.{key}: found"):
        RanPAC(**options)


@pytest.mark.parametrize("train_first", [False, True])
def test_it_learns_digits(train_first):
    stream = class_incremental(SOURCES.get("digits")(), experiences=5, order="sorted")
    torch.manual_seed(0)
    net = Network(BACKBONES.get("small_cnn")(stream.input_shape))
    strategy = RanPAC(projection=300, train_first=train_first)
    module = ContinualModule(net, strategy, optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
    loop = LightningStrategy(model=module, benchmark=stream, train_mb_size=32, eval_mb_size=256, evaluator=None)
    for experience in stream.avalanche.train_stream:
        loop.train(experience)
    x, y = torch.cat([p.prepare(p.x) for p in stream.test]), torch.cat([p.y for p in stream.test])
    with torch.no_grad():
        output = net.eval()(x, taps=module.learner.taps)
    right = module.learner.adjust_logits(output).last.argmax(1) == y
    assert right.float().mean() > 0.85  # random features; chance is 0.1
    assert loop.clock.train_iterations == (-(-len(stream.train[0]) // 32) if train_first else 0)
