"""SimpleCIL: prototypes and cosines at every exit."""

from __future__ import annotations

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
from strategies import SimpleCIL


def network(*, exits=1):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=6), exits=[("layer1", GrowingLinear(6))] * (exits - 1))
    net.grow(range(4))
    return net


def data(classes, per_class, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([c for _ in range(per_class) for c in classes])
    return TensorSamples(torch.randn(len(y), 1, 2, 2, generator=generator) + y.reshape(-1, 1, 1, 1), y)


def learnt(component, net, parts, state=None):
    state = component.init_state(net) if state is None else state
    for index, part in enumerate(parts):
        experience = Experience(index, 3, tuple(part.y.unique().tolist()), (), (), part)
        state = component.after_experience(net, StepContext(experience, 0, 1, generator_for(0, index)), state)
    return state


@pytest.mark.parametrize("exits", [1, 3])
def test_every_exit_answers_by_cosines_with_its_own_class_means(exits):
    net, parts = network(exits=exits), [data((0, 1), 9), data((3, 0), 400, seed=1)]
    state = learnt(SimpleCIL(), net, parts)
    x, y, test = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), torch.randn(5, 1, 2, 2)
    with torch.no_grad():
        seen, asked = net(x, taps=net.exit_taps), net(test, taps=net.exit_taps)
    answers = SimpleCIL(scale=20.0).adjust_logits(asked, state)
    for exit, tap in enumerate(net.exit_taps):
        assert answers.logits[exit].shape == (5, 4) and answers.logits[exit][:, 2].max() == -torch.inf
        for c in (0, 1, 3):
            mu = seen.taps[tap][y == c].mean(0)
            expected = 20 * torch.nn.functional.cosine_similarity(asked.taps[tap], mu[None])
            torch.testing.assert_close(answers.logits[exit][:, c], expected, rtol=1e-5, atol=1e-5)
    backwards = learnt(SimpleCIL(), net, parts[::-1])
    torch.testing.assert_close(state["mean"][-1], backwards["mean"][-1], rtol=1e-12, atol=1e-12)


def test_logits_until_there_are_means_and_a_checkpoint_between():
    net, parts = network(), [data((0, 1), 5), data((2, 3), 5)]
    output = Output((torch.ones(2, 4),), {"layer2": torch.ones(2, 6)})
    assert all(a is b for a, b in zip(SimpleCIL().adjust_logits(output, SimpleCIL().init_state(net)).logits, output.logits, strict=True))
    half = learnt(SimpleCIL(), net, parts[:1])
    one, other = (learnt(SimpleCIL(), net, parts[1:], state) for state in (half, decode(encode(half), net)))
    assert torch.equal(one["mean"][0], other["mean"][0]) and one["count"].tolist() == [5, 5, 5, 5]


def test_one_sample():
    net = network()
    state = learnt(SimpleCIL(), net, [data((1,), 1)])
    scores = SimpleCIL().adjust_logits(net(torch.randn(3, 1, 2, 2), taps=net.exit_taps), state).last
    assert scores.argmax(1).tolist() == [1, 1, 1] and scores[:, 1].abs().max() <= 1 + 1e-6


def test_impossible_scale():
    with pytest.raises(ConfigError, match=r"components.simplecil.scale: found 0.0; give a number above 0"):
        SimpleCIL(scale=0)


@pytest.mark.parametrize("train_first", [False, True])
def test_it_learns_digits(train_first):
    stream = class_incremental(SOURCES.get("digits")(), experiences=5, order="sorted")
    torch.manual_seed(0)
    net = Network(BACKBONES.get("small_cnn")(stream.input_shape))
    module = ContinualModule(net, SimpleCIL(train_first=train_first), optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
    loop = LightningStrategy(model=module, benchmark=stream, train_mb_size=32, eval_mb_size=256, evaluator=None)
    for experience in stream.avalanche.train_stream:
        loop.train(experience)
    x, y = torch.cat([p.prepare(p.x) for p in stream.test]), torch.cat([p.y for p in stream.test])
    with torch.no_grad():
        output = net.eval()(x, taps=module.learner.taps)
    right = module.learner.adjust_logits(output).last.argmax(1) == y
    assert right.float().mean() > 0.55 and right[y < 2].float().mean() > 0.6  # random features; nothing forgotten
    assert loop.clock.train_iterations == (-(-len(stream.train[0]) // 32) if train_first else 0)
