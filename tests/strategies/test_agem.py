"""A-GEM: the gradient after projection, against the projection longhand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clframe.core import Batch, Experience, Step, StepContext, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.errors import ConfigError
from clframe.functional.losses import cross_entropy
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.seeding import generator_for
from clframe.training.learner import Learner
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import AGEM, Exits


def context(index, classes, past=(), *, shape=(1, 2, 2), seed=0):
    y = torch.tensor([c for c in classes for _ in range(9)])
    part = TensorSamples(torch.rand(len(y), *shape) + y.reshape(-1, 1, 1, 1), y, mean=(0.5,), std=(2.0,))
    return StepContext(Experience(index, 9, tuple(classes), tuple(past), (), part), 0, 1, generator_for(seed, index))


def network(exits=1, classes=3, backbone="mlp", shape=(1, 2, 2)):
    torch.manual_seed(0)
    options = {"width": 5} if backbone == "mlp" else {}
    net = Network(
        BACKBONES.get(backbone)(shape, **options), exits=[("layer1", GrowingLinear(5)) for _ in range(exits - 1)]
    )
    net.grow(range(classes))
    return net


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def stepped(net, agem, state, y, *, weight_K=None, shape=(1, 2, 2), seed=1):
    """A step after backward, and the gradient that came of it."""
    now = context(1, (2,), (0, 1), shape=shape, seed=seed)
    batch = Batch(torch.randn(len(y), *shape), torch.tensor(y))
    output = net(batch.x)
    loss_K = cross_entropy(output.logits, batch.y)
    (loss_K if weight_K is None else loss_K * weight_K).sum().backward()
    return Step(batch, output, now, net, weight_K)


def reference(net, agem, state, now, weight_K=None):
    """The gradient of a batch of memory, by the plainest way: every parameter's ``.grad``."""
    generator = generator_for(1, 1)
    index = torch.randint(len(state["y"]), (agem.sample,), generator=generator)
    x = (state["x"][index] - 0.5) / 2.0
    loss_K = torch.stack([torch.nn.functional.cross_entropy(l_BC, state["y"][index]) for l_BC in net(x).logits])
    return flat(torch.autograd.grad((loss_K if weight_K is None else loss_K * weight_K).sum(), list(net.parameters())))


@pytest.mark.parametrize("exits, weight_K", [(1, None), (3, None), (3, torch.tensor([0.1, 0.5, 2.0]))])
@pytest.mark.parametrize("y", [[2, 2, 2], [0, 1, 0, 1]])
def test_the_gradient_is_projected_onto_what_the_memory_allows(exits, weight_K, y):
    agem, net = AGEM(memory=6, sample=5), network(exits)
    state = agem.after_experience(net, context(0, (0, 1)), agem.init_state(net))
    now = stepped(net, agem, state, y, weight_K=weight_K)
    before, r = flat(p.grad for p in net.parameters()), reference(net, agem, state, now, weight_K)
    values = [p.detach().clone() for p in net.parameters()]
    agem.modify_gradients(net, now, state)
    after = flat(p.grad for p in net.parameters())
    dot = before @ r
    assert (dot < 0) == (y[0] == 2)  # new classes pull against the old, old ones along
    expected = before - dot / (r @ r) * r if dot < 0 else before
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)
    assert dot >= 0 or abs(float(after @ r)) < 1e-4 * float(before.norm() * r.norm())
    assert all(torch.equal(a, b) for a, b in zip(values, net.parameters(), strict=True))


def test_without_memory_nothing_is_projected():
    agem, net = AGEM(), network()
    now = stepped(net, agem, agem.init_state(net), [2, 2])
    before = [p.grad.clone() for p in net.parameters()]
    agem.modify_gradients(net, now, agem.init_state(net))
    assert all(torch.equal(a, p.grad) for a, p in zip(before, net.parameters(), strict=True))


def test_statistics_of_batch_normalization_are_left_alone_and_frozen_parts_stay_out():
    shape = (1, 8, 8)
    agem, net = AGEM(memory=6, sample=4), network(backbone="resnet20", shape=shape)
    state = agem.after_experience(net, context(0, (0, 1), shape=shape), agem.init_state(net))
    first = next(iter(net.parameters())).requires_grad_(False)
    now = stepped(net.train(), agem, state, [2, 2, 2], shape=shape)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    before = flat(p.grad for p in net.parameters() if p.grad is not None)
    agem.modify_gradients(net, now, state)
    assert first.grad is None and net.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert not torch.equal(before, flat(p.grad for p in net.parameters() if p.grad is not None))


def test_the_engine_tells_the_weights_of_the_exits():
    """Exits that ramp from 0.01: what A-GEM sees is what the loss was made with."""
    seen = []

    class Spy(AGEM):
        def modify_gradients(self, network, step, state):
            seen.append(step.weight_K)

    net = network(classes=0)
    learner = Learner(net, compose(Exits(at=("layer1",), values=(0.5,)), Spy()), seed=0)
    learner.begin(context(0, (0, 1)).experience, classes=(0, 1), epochs=2)
    for epoch in range(2):
        learner.before_epoch(epoch)
        batch = learner.make_batch(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
        learner.loss(batch, net(batch.x)).sum().backward()
        learner.modify_gradients()
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[0.01, 1.0], [0.5, 1.0]]))


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: AGEM(sample=0), "components.agem.sample"),
        (lambda: AGEM(memory=0), "components.agem.memory"),
        (lambda: AGEM(budget="per_class"), "components.agem.budget"),
    ],
)
def test_impossible_options(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


def test_it_slows_forgetting():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(4).repeat(30)
    centers = 3 * torch.randn(4, 1, 2, 2, generator=generator)
    data = TensorSamples(centers[y] + 0.3 * torch.randn(len(y), 1, 2, 2, generator=generator), y)
    benchmark = class_incremental(Source("blobs", data, data, classes=4), experiences=2, order="sorted")
    losses = {}
    for expression in ("naive", "agem(memory=20, sample=20)"):
        torch.manual_seed(2)
        net = Network(BACKBONES.get("mlp")((1, 2, 2), width=16))
        module = ContinualModule(net, parse(expression), optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
        loop = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=10, train_epochs=2, evaluator=None)
        for experience in benchmark.avalanche.train_stream:
            loop.train(experience)
        with torch.no_grad():
            old, new = (cross_entropy(net.eval()(part.x).logits, part.y).item() for part in benchmark.test)
        losses[expression] = (old, new)
    (naive_old, _), (ours_old, ours_new) = losses.values()
    assert ours_old < 0.7 * naive_old and ours_new < 1.0
