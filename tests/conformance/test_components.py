"""One suite for every component there is: registering a component enrols it here."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from functools import partial

import pytest
import torch

from clframe.core import COMPONENTS, HOOKS, SLOTS, Component, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.errors import ComposeError, ConfigError
from clframe.exits import make_head
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

NAMES = COMPONENTS.names()
NEEDS_TOKENS = {"l2p", "moe"}
"""Components that refuse every backbone but a vision transformer, or an exit on the first layer of two."""


def benchmark(classes=6, per_class=8, experiences=3):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(classes).repeat(per_class)
    x = torch.randn(len(y), 1, 4, 4, generator=generator) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(
        Source("blobs", data, data, classes=classes), experiences=experiences, order="sorted"
    )


def fed(strategy):
    """The strategy with a memory beside it, where one of its components needs one that none keeps."""
    composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
    lacks = any(c.needs_memory for c in composition) and not any(c.keeps_memory for c in composition)
    return composition + COMPONENTS.get("er")() if lacks and composition.owner("batch") is None else composition


def untrained(strategy, stream, *, exits=1, seed=3):
    """The network as it is before the strategy: a small MLP, or a transformer where a component needs tokens."""
    composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
    torch.manual_seed(seed)
    if {component.name for component in composition} & NEEDS_TOKENS:
        backbone = BACKBONES.get("vit_tiny")(stream.input_shape, patch=2, width=12, depth=2, heads=2)
        heads = [("encoder.0", make_head("token", backbone.tap_shapes["encoder.0"])) for _ in range(exits - 1)]
    else:
        backbone = BACKBONES.get("mlp")(stream.input_shape, width=12)
        heads = [("layer1", GrowingLinear(12)) for _ in range(exits - 1)]
    return Network(backbone, exits=heads)


def train(strategy, stream, *, exits=1, seed=3, experiences=None):
    network = untrained(strategy, stream, exits=exits, seed=seed)
    module = ContinualModule(network, fed(strategy), optimizer=partial(torch.optim.SGD, lr=0.05), seed=seed)
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=5, train_epochs=2, eval_mb_size=16, evaluator=None
    )
    for experience in itertools.islice(stream.avalanche.train_stream, experiences):
        loop.train(experience)
    return module


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


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_with_finite_losses_that_move_every_weight(name, exits):
    stream = benchmark()
    module = train(name, stream, exits=exits)
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
    stream = benchmark()
    for a, b in zip(weights(train(name, stream)), weights(train(name, stream)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in NAMES if COMPONENTS.get(n).weight is not None])
def test_weight_zero_is_bit_identical_to_absence(name):
    kind, stream = COMPONENTS.get(name), benchmark()
    off = kind(**{kind.weight: 0.0})
    assert compose(off) == compose()
    for other in ("naive", "lwf", "er"):
        if other != name:
            a, b = train(compose(off, COMPONENTS.get(other)()), stream), train(other, stream)
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_its_state_round_trips_through_a_checkpoint(name, tmp_path):
    module = train(name, benchmark(), experiences=2)
    state = module.learner.state
    torch.save(encode(state), tmp_path / "state")
    loaded = decode(torch.load(tmp_path / "state", weights_only=True), module.network)
    assert same(state, loaded)


def same(a, b):
    if isinstance(a, Network):
        return same(dict(a.state_dict()), dict(b.state_dict())) and not any(
            p.requires_grad for p in b.parameters()
        )
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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


@pytest.mark.parametrize("a, b", PAIRS)
def test_every_pair_composes_and_commutes_or_names_the_slot(a, b):
    first, second = COMPONENTS.get(a), COMPONENTS.get(b)
    shared = first.slots & second.slots
    if shared:
        with pytest.raises(ComposeError, match=f"'{a}' and '{b}' both own the slot '{sorted(shared)[0]}'"):
            compose(first(), second())
        return
    stream = benchmark(classes=4, per_class=3, experiences=2)
    pair = fed(first() + second())
    if any(c.needs_memory for c in pair) and not any(c.keeps_memory for c in pair):
        with pytest.raises(ComposeError, match="needs a memory"):
            train(pair, stream)
        return
    # Equal compositions hold equal components in the same order, so the weights of every tenth pair are evidence enough.
    assert pair == fed(second() + first())
    assert [component.name for component in first() + second()] == [component.name for component in second() + first()]
    left = train(first() + second(), stream)
    assert all(bool(torch.isfinite(p).all()) for p in left.parameters())
    if PAIRS.index((a, b)) % 10 == 0:
        right = train(second() + first(), stream)
        assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))
