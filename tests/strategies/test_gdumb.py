"""GDumb: a memory that holds the experience at hand, and a network that starts over for real."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from clframe.core import Experience, StepContext, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.streams import rotated_stream
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, Network
from clframe.seeding import generator_for
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import Exits, GDumb


def samples(sizes, *, offset=0):
    """Images whose first pixel is their number, from ``offset``."""
    y = torch.tensor([c for c, n in sizes.items() for _ in range(n)], dtype=torch.long)
    x = torch.rand(len(y), 1, 2, 2)
    x[:, 0, 0, 0] = offset + torch.arange(len(y))
    return TensorSamples(x, y)


def context(index, sizes, past=(), *, seed=0):
    part = samples(sizes, offset=1000 * index)
    return StepContext(Experience(index, 9, tuple(sizes), tuple(past), (), part), 0, 1, generator_for(seed, index))


def build(backbone, shape, exits, seed=4):
    torch.manual_seed(seed)
    options = {"width": 6} if backbone == "mlp" else {}
    net = Network(BACKBONES.get(backbone)(shape, **options))
    if exits:
        for component in compose(exits).acting_at("setup_network"):
            component.setup_network(net)
    return net


def copied(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


EXITS = [
    None,
    Exits(heads="growing", ensemble="geometric"),
    Exits(heads="per_experience", cascade=True, cascade_norm=True, ensemble="geometric"),
]


@pytest.mark.parametrize("exits", EXITS, ids=["plain", "growing", "per_experience"])
@pytest.mark.parametrize("backbone, shape", [("mlp", (1, 2, 2)), ("resnet20", (1, 8, 8))])
def test_every_weight_and_buffer_is_that_of_a_fresh_build(backbone, shape, exits):
    gdumb, net, fresh = GDumb(memory=6), build(backbone, shape, exits), build(backbone, shape, exits)
    state = gdumb.init_state(net)
    for index, classes in enumerate([(0, 1), (3,)]):
        net.grow(classes)
        with torch.no_grad():  # training moves everything, in place and by way of new tensors
            for tensor in net.state_dict().values():
                tensor.add_(1) if tensor.is_floating_point() else None
        now = context(index, dict.fromkeys(classes, 3))
        torch.manual_seed(index)
        state = gdumb.before_experience(net, now, state)
    torch.manual_seed(1)
    fresh.grow((0, 1))
    fresh.grow((3,))
    a, b = net.state_dict(), fresh.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    x = torch.rand(3, *shape)
    assert all(torch.equal(p, q) for p, q in zip(net.eval()(x).logits, fresh.eval()(x).logits, strict=True))
    assert all(p.requires_grad == q.requires_grad for p, q in zip(net.parameters(), fresh.parameters(), strict=True))


def test_what_is_kept_of_the_first_weights_does_not_follow_training():
    net, gdumb = build("mlp", (1, 2, 2), None), GDumb()
    state, before = gdumb.init_state(net), copied(net)
    for parameter in net.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(state["blank"][name], before[name]) for name in before)


def test_the_paper_code_never_starts_over():
    net, gdumb = build("mlp", (1, 2, 2), None), GDumb(restart="never")
    state, before = gdumb.init_state(net), copied(net)
    assert gdumb.before_experience(net, context(1, {0: 2}), state) is state and state["blank"] == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def greedy(stream, memory, seed=0):
    """The published sampler: make room for a class that is short of its share by dropping from the largest."""
    draw, kept, met = torch.Generator().manual_seed(seed), [], set()
    for sizes in stream:
        labels = [c for c, n in sizes.items() for _ in range(n)]
        for i in torch.randperm(len(labels), generator=draw).tolist():
            c = labels[i]
            met.add(c)
            counts = Counter(kept)
            if c not in counts or counts[c] < memory / len(met):
                if len(kept) >= memory:
                    kept.remove(counts.most_common(1)[0][0])
                kept.append(c)
    return Counter(kept)


@pytest.mark.parametrize("memory", [6, 7, 20])
def test_the_memory_holds_the_experience_at_hand_in_the_shares_of_the_published_sampler(memory):
    stream = [{0: 30, 1: 30}, {2: 30}, {3: 30, 4: 30, 5: 30}]
    net, gdumb = build("mlp", (1, 2, 2), None), GDumb(memory=memory)
    state = gdumb.init_state(net)
    for index, sizes in enumerate(stream):
        now = context(index, sizes)
        pooled, size = gdumb.training_set(now.experience.samples, 8, state)
        again, _ = gdumb.training_set(now.experience.samples, 8, state)
        before = set() if state["x"] is None else set(state["x"][:, 0, 0, 0].tolist())
        state = gdumb.after_experience(net, now, gdumb.before_experience(net, now, state))
        assert size == 8 and len(pooled) == memory
        assert (
            torch.equal(pooled.x, again.x) and torch.equal(pooled.x, state["x"]) and torch.equal(pooled.y, state["y"])
        )
        numbers = set(pooled.x[:, 0, 0, 0].tolist())
        assert {n for n in numbers if n < 1000 * index} <= before and max(numbers) >= 1000 * index
        ours, theirs = Counter(pooled.y.tolist()), greedy(stream[: index + 1], memory)
        assert sorted(ours.values()) == sorted(theirs.values()) and ours.keys() == theirs.keys()


def test_what_is_kept_depends_on_the_seed_of_the_run():
    kept = set()
    for seed in range(6):
        state = GDumb().init_state(build("mlp", (1, 2, 2), None, seed=seed))
        pooled, _ = GDumb(memory=3).training_set(samples({0: 50}), 8, state)
        kept.add(tuple(pooled.x[:, 0, 0, 0].tolist()))
    assert len(kept) == 6


def test_views_of_a_domain_are_kept_as_seen():
    source = Source("toy", samples({0: 4, 1: 4}), samples({0: 1, 1: 1}), classes=2)
    benchmark = rotated_stream(source, experiences=2)
    state = GDumb().init_state(build("mlp", (1, 2, 2), None))
    pooled, _ = GDumb(memory=100).training_set(benchmark.train[1], 8, state)
    seen = benchmark.train[1].raw(torch.arange(8))
    assert sorted(pooled.raw(torch.arange(8)).flatten(1).tolist()) == sorted(seen.flatten(1).tolist())


# --- runs ------------------------------------------------------------------------------------------------------------


def blobs(classes=6, per_class=12):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(classes).repeat(per_class)
    centers = 3 * torch.randn(classes, 1, 2, 2, generator=generator)
    x = centers[y] + 0.3 * torch.randn(len(y), 1, 2, 2, generator=generator)
    data = TensorSamples(x, y)
    return class_incremental(Source("blobs", data, data, classes=classes), experiences=3, order="sorted")


def trained(expression, *, epochs, benchmark=None):
    benchmark = benchmark or blobs()
    torch.manual_seed(2)
    sgd = partial(torch.optim.SGD, lr=0.2)
    module = ContinualModule(
        Network(BACKBONES.get("mlp")((1, 2, 2), width=16)), parse(expression), optimizer=sgd, seed=0
    )
    loop = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=6, evaluator=None)
    for experience, count in zip(benchmark.avalanche.train_stream, epochs, strict=True):
        loop.train_epochs = count
        loop.train(experience)
    return module, loop


def accuracy(module, benchmark):
    with torch.no_grad():
        found = [module.eval()(part.prepare(part.x)).argmax(1) == part.y for part in benchmark.test]
    return [float(hits.float().mean()) for hits in found]


def test_the_last_experience_alone_makes_the_network():
    a, loop = trained("gdumb(memory=18)", epochs=(1, 1, 3))
    b, _ = trained("gdumb(memory=18)", epochs=(2, 5, 3))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    c, _ = trained("gdumb(memory=18, restart='never')", epochs=(1, 1, 3))
    d, _ = trained("gdumb(memory=18, restart='never')", epochs=(2, 5, 3))
    assert not all(torch.equal(p, q) for p, q in zip(c.parameters(), d.parameters(), strict=True))
    assert loop.clock.train_iterations == 3 * (1 + 1 + 3)  # 18 of 24 samples in batches of 6


def test_it_learns_all_classes_alike_where_training_on_new_data_forgets():
    benchmark = blobs()
    ours, _ = trained("gdumb(memory=30)", epochs=(1, 1, 60), benchmark=benchmark)
    naive, _ = trained("naive", epochs=(20, 20, 20), benchmark=benchmark)
    assert min(accuracy(ours, benchmark)) > 0.9
    assert max(accuracy(naive, benchmark)[:2]) < 0.3


@pytest.mark.parametrize("memory", [0, -1])
def test_an_empty_memory_is_refused(memory):
    with pytest.raises(ConfigError, match=r"components.gdumb.memory: found"):
        GDumb(memory=memory)
