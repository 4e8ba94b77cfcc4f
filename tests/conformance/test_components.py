"""One suite for every component there is: registering a component enrols it here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from functools import partial

import pytest
import torch
from conformance_runs import NAMES, benchmark, fed, same, untrained

from clframe.core import COMPONENTS, HOOKS, SLOTS, Component, compose, parse
from clframe.errors import ComposeError, ConfigError
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy


def train(strategy, stream, *, exits=1, seed=3, experiences=None):
    network = untrained(strategy, stream, exits=exits, seed=seed)
    module = ContinualModule(network, fed(strategy), optimizer=partial(torch.optim.SGD, lr=0.05), seed=seed)
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=5, train_epochs=2, eval_mb_size=16, evaluator=None
    )
    module.after_each = []
    for experience in itertools.islice(stream.avalanche.train_stream, experiences):
        loop.train(experience)
        module.after_each.append(weights(module))
    return module


@functools.cache
def trained(name, exits=1):
    """A trained module that tests of one component share."""
    return train(name, benchmark(), exits=exits)


@functools.cache
def stopped(name):
    """One that was stopped after two of the three experiences."""
    return train(name, benchmark(), experiences=2)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_documented_frozen_dataclass_with_keyword_options_and_defaults(name):
    kind = COMPONENTS.get(name)
    assert issubclass(kind, Component) and kind.name == name
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert kind() == kind() and hash(kind()) == hash(kind())
    assert kind.slots <= set(SLOTS) and set(kind().acts_at()) <= set(HOOKS)
    first = (inspect.getdoc(kind) or "").splitlines()[0]
    assert len(first) > 20 and first.endswith(".")
    for field in dataclasses.fields(kind):
        assert f"{field.name}:" in kind.__doc__, f"option {field.name} is not documented"


@pytest.mark.parametrize("name", NAMES)
def test_its_hooks_take_and_return_what_the_engine_passes_and_stores(name):
    kind = COMPONENTS.get(name)
    for hook in kind().acts_at():
        own, base = (inspect.signature(getattr(owner, hook)) for owner in (kind, Component))
        assert list(own.parameters) == list(base.parameters), hook
        assert own.return_annotation == base.return_annotation or hook == "resolve", hook


@pytest.mark.parametrize(
    "name, exits",
    # With three exits every second component; tests/golden trains all of them.
    [pytest.param(n, k, marks=[pytest.mark.slow] * (k == 3 and i % 2 == 1)) for i, n in enumerate(NAMES) for k in (1, 3)],
)
def test_it_trains_with_finite_losses_that_move_every_weight(name, exits):
    stream, module = benchmark(), trained(name, exits)
    kind = COMPONENTS.get(name)
    fresh = untrained(kind(), stream, exits=exits)
    for component in compose(kind()):
        component.setup_network(fresh)
    assert module.network.classes == 6
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    trains = any(kind().training_experiences(index, 3) for index in range(3))  # else it answers without training anything
    weights = dict(module.network.backbone.named_parameters())
    for weight, before in fresh.backbone.named_parameters():
        if ".router." in weight:  # fitted between experiences, by itself
            assert not before.requires_grad and not torch.equal(before, weights[weight])
            continue
        assert torch.equal(before, weights[weight]) != (trains and before.requires_grad), weight
    sums = module.learner.flush_terms()
    assert set(sums) <= {"loss/task/ce", *(f"loss/{name}/{term}" for term in kind.terms)}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights(name):
    for a, b in zip(trained(name).after_each[1], weights(stopped(name)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in NAMES if COMPONENTS.get(n).weight is not None])
def test_weight_zero_is_bit_identical_to_absence(name):
    kind = COMPONENTS.get(name)
    off = kind(**{kind.weight: 0.0})
    assert compose(off) == compose()
    others = [other for other in ("naive", "lwf", "er") if other != name]
    for other in others:
        assert compose(off, COMPONENTS.get(other)()) == parse(other)
    # Equal compositions are equal runs, of which one is trained.
    other = others[NAMES.index(name) % len(others)]
    a, b = train(compose(off, COMPONENTS.get(other)()), benchmark()), trained(other)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_its_state_round_trips_through_a_checkpoint(name, tmp_path):
    module = stopped(name)
    state = module.learner.state
    torch.save(encode(state), tmp_path / "state")
    loaded = decode(torch.load(tmp_path / "state", weights_only=True), module.network)
    assert same(state, loaded)


@pytest.mark.parametrize("name", NAMES)
def test_it_survives_one_class_and_one_sample_an_experience(name):
    module = train(name, benchmark(classes=3, per_class=1, experiences=3))
    assert module.network.classes == 3
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "memory" in {f.name for f in dataclasses.fields(COMPONENTS.get(n))}]
)
def test_a_memory_smaller_than_the_classes_is_refused(name):
    with pytest.raises(ConfigError, match=rf"components\.{name}\.memory: found 2 for 6 classes"):
        COMPONENTS.get(name)(memory=2).check(classes=6)


PAIRS = list(itertools.combinations(NAMES, 2))
TRAINED_EVERY = 9
"""One in so many pairs of each component is trained in the default suite, all of them in the slow one."""


def pair_of(a, b):
    """Both components with a memory where they need one; None where they are refused."""
    first, second = COMPONENTS.get(a), COMPONENTS.get(b)
    if first.slots & second.slots:
        return None
    pair = fed(first() + second())
    lacks_memory = any(c.needs_memory for c in pair) and not any(c.keeps_memory for c in pair)
    renewed = any(c.renews_weights for c in pair) and any(c.remembers_weights for c in pair)
    return None if lacks_memory or renewed else pair


def is_slow(a, b):
    return (NAMES.index(a) + NAMES.index(b)) % TRAINED_EVERY != 0


@pytest.mark.parametrize("a", NAMES[:-1])
def test_every_pair_composes_and_commutes_or_names_the_slot(a):
    for b in NAMES[NAMES.index(a) + 1 :]:
        check_pair(a, b)


def check_pair(a, b):
    first, second = COMPONENTS.get(a), COMPONENTS.get(b)
    shared = first.slots & second.slots
    if shared:
        with pytest.raises(ComposeError, match=f"'{a}' and '{b}' both own the slot '{sorted(shared)[0]}'"):
            compose(first(), second())
        return
    pair = pair_of(a, b)
    if pair is None:
        with pytest.raises(ComposeError, match="needs a memory|keeps values of single weights"):
            train(fed(first() + second()), benchmark(classes=4, per_class=3, experiences=2))
        return
    # Equal compositions hold equal components in the same order, so the weights of a few pairs are evidence enough.
    assert pair == fed(second() + first())
    assert [component.name for component in first() + second()] == [component.name for component in second() + first()]


@pytest.mark.parametrize(
    "a, b", [pytest.param(*pair, marks=[pytest.mark.slow] * is_slow(*pair)) for pair in PAIRS if pair_of(*pair)]
)
def test_a_pair_trains_with_finite_weights(a, b):
    stream = benchmark(classes=4, per_class=3, experiences=2)
    first, second = COMPONENTS.get(a), COMPONENTS.get(b)
    left = train(first() + second(), stream)
    assert all(bool(torch.isfinite(p).all()) for p in left.parameters())
    if PAIRS.index((a, b)) % 10 == 0:
        right = train(second() + first(), stream)
        assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))
