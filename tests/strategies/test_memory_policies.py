"""What a memory keeps and how it joins a batch, for every policy."""

from __future__ import annotations

import io
from collections import Counter
from functools import partial

import pytest
import torch

from clframe.core import Batch, Experience, StepContext
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.augmentation import Flip
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, Network
from clframe.nn.features import feature_reader
from clframe.options import check_options
from clframe.replay.buffers import MemoryPolicy
from clframe.replay.selection import herding
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode, nbytes
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import ER

SELECTIONS = ("balanced", "herding", "random", "reservoir")


def samples(sizes, *, offset=0, **options):
    """Images whose first pixel is their number, from ``offset``: every one can be told from every other."""
    y = torch.tensor([c for c, n in sizes.items() for _ in range(n)], dtype=torch.long)
    x = torch.rand(len(y), 1, 2, 3)
    x[:, 0, 0, 0] = offset + torch.arange(len(y))
    return TensorSamples(x, y, **options)


def context(index, sizes, *, seed=0, offset=0, **options):
    part = samples(sizes, offset=offset, **options)
    return StepContext(Experience(index, 9, tuple(sizes), (), (), part), 0, 1, generator_for(seed, index))


def network():
    net = Network(BACKBONES.get("mlp")((1, 2, 3), width=5))
    net.grow(range(3))
    return net


def run(er, stream, *, seed=0):
    """The memory after every experience of ``stream``, a list of {class: samples}."""
    net = network()
    states = [er.init_state(net)]
    for index, sizes in enumerate(stream):
        states.append(er.after_experience(net, context(index, sizes, seed=seed, offset=1000 * index), states[-1]))
    return states


def numbers(state):
    return state["x"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("memory", [1, 6, 7, 1000])
def test_the_memory_never_exceeds_its_size_and_keeps_whole_samples(selection, memory):
    stream = [{0: 9, 1: 4}, {2: 1}, {3: 8, 4: 8, 5: 8}]
    states = run(ER(memory=memory, selection=selection), stream)
    original = {}
    for index, sizes in enumerate(stream):
        before, after = states[index : index + 2]
        seen = sum(n for part in stream[: index + 1] for n in part.values())
        assert 1 <= len(after["y"]) <= min(memory, seen)
        assert len(after["x"]) == len(after["y"]) == len(set(numbers(after)))
        classes = [c for c, n in sizes.items() for _ in range(n)]
        original |= {float(1000 * index + i): c for i, c in enumerate(classes)}
        assert [original[n] for n in numbers(after)] == after["y"].tolist()
        if before["x"] is not None:  # nobody comes back
            assert {n for n in numbers(after) if n < 1000 * index} <= set(numbers(before))
    if memory == 1000:
        assert sorted(numbers(states[-1])) == sorted(original)


@pytest.mark.parametrize("selection", ["balanced", "herding"])
@pytest.mark.parametrize(
    "budget, memory, expected",
    [
        ("total", 8, [{0: 4, 1: 4}, {0: 3, 1: 3, 2: 2}, {0: 3, 1: 3, 2: 2}]),
        ("per_class", 3, [{0: 3, 1: 3}, {0: 3, 1: 3, 2: 3}, {0: 3, 1: 3, 2: 3}]),
        ("per_class", 6, [{0: 6, 1: 5}, {0: 6, 1: 5, 2: 6}, {0: 6, 1: 4, 2: 6}]),
    ],
)
def test_classes_share_the_memory(selection, budget, memory, expected):
    """The third experience brings 0 and 1 again: a class's share is divided among its portions."""
    states = run(ER(memory=memory, budget=budget, selection=selection), [{0: 9, 1: 5}, {2: 9}, {1: 1, 0: 9}])
    counts = [dict(Counter(s["y"].tolist())) for s in states[1:]]
    assert counts == expected


def test_random_shares_by_experience_whatever_the_classes():
    states = run(ER(memory=7, selection="random"), [{0: 20, 1: 1}, {2: 9}, {3: 30}])
    counts = [Counter(int(n // 1000) for n in numbers(s)) for s in states[1:]]
    assert counts == [{0: 7}, {0: 4, 1: 3}, {0: 3, 1: 2, 2: 2}]


@pytest.mark.parametrize("selection", ["balanced", "herding", "random"])
def test_late_experiences_have_places_in_a_memory_of_fewer_samples_than_portions(selection):
    """Twelve experiences with the same two classes: a class has four places, fewer than there are experiences."""
    memory = 8 if selection != "random" else 4
    states = run(ER(memory=memory, selection=selection), [{0: 9, 1: 9}] * 12)
    counts = [Counter(int(n // 1000) for n in numbers(s)) for s in states[1:]]
    assert [sum(count.values()) for count in counts] == [memory] * 12
    assert any(experience > 5 for experience in counts[-1])
    if selection != "random":
        assert all(Counter(s["y"].tolist()) == {0: 4, 1: 4} for s in states[1:])


def test_the_reservoir_holds_every_sample_alike():
    """Chi-square over 12 samples of three experiences, 4 kept; 31.3 is its 99.9 % quantile at 11 degrees."""
    er, runs, counts = ER(memory=4, selection="reservoir"), 1500, Counter()
    net, parts = network(), [{0: 6}, {1: 2}, {2: 4}]
    contexts = [context(i, sizes, offset=1000 * i) for i, sizes in enumerate(parts)]
    for seed in range(runs):
        state = er.init_state(net)
        for m in contexts:
            state = er.after_experience(net, StepContext(m.experience, 0, 1, generator_for(seed, m.experience.index)), state)
        counts.update(numbers(state))
    expected = runs * 4 / 12
    assert len(counts) == 12
    # Drawing without replacement narrows the statistic by 8 / 11; the quantile then errs on the safe side.
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 31.3


@pytest.mark.parametrize("selection", ["balanced", "random", "reservoir"])
def test_random_selections_differ_by_seed(selection):
    kept = {tuple(numbers(run(ER(memory=4, selection=selection), [{0: 9, 1: 9}], seed=s)[-1])) for s in range(8)}
    assert len(kept) > 4


def test_herding_keeps_the_samples_nearest_to_the_class_mean_in_feature_space():
    net, now = network(), context(0, {0: 9, 1: 7})
    state = ER(memory=6, selection="herding").after_experience(net, now, ER().init_state(net))
    part = now.experience.samples
    with torch.no_grad():
        features = net.eval().backbone(part.prepare(part.x))
    expected = [part.x[part.y == c][herding(features[part.y == c], 3)] for c in (0, 1)]
    assert torch.equal(state["x"], torch.cat(expected)) and state["y"].tolist() == [0] * 3 + [1] * 3
    net.train()
    smaller = ER(memory=6, selection="herding").after_experience(net, context(1, {2: 9}), state)
    assert torch.equal(smaller["x"][:4], torch.cat([e[:2] for e in expected]))


def test_features_are_those_of_evaluation_and_leave_the_network_alone():
    torch.manual_seed(0)
    net = Network(BACKBONES.get("resnet20")((1, 8, 8)))  # batch normalization knows training from evaluation
    part = TensorSamples(torch.rand(7, 1, 8, 8), torch.zeros(7).long(), augment=(Flip(1.0),))
    net.train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    read = feature_reader(net, part, batch_size=3)(torch.arange(7))
    assert net.training and all(m.training for m in net.modules())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(read, net.eval().backbone(part.x))
    assert not read.requires_grad


@pytest.mark.parametrize("size", [1, 5])
def test_a_fixed_number_is_replayed_whatever_the_batch(size):
    er = ER(memory=4, replay="fixed", replayed=7, scale=0.5)
    state = run(er, [{0: 9, 1: 9}])[-1]
    now = context(1, {2: 9})
    x, y = now.experience.samples.batch(torch.arange(size))
    joined = er.make_batch(Batch(x, y), now, state, network())
    assert len(joined.y) == size + 7 and torch.equal(joined.x[:size], x) and set(joined.y[size:].tolist()) <= {0, 1}
    assert joined.weight_B.tolist() == [1.0] * size + [0.5] * 7


def test_replayed_samples_are_augmented_by_the_components_generator():
    er = ER(memory=8)
    state = run(er, [{0: 9, 1: 9}])[-1]
    plain, mirrored = context(1, {2: 9}), context(1, {2: 9}, augment=(Flip(1.0),))
    batch = Batch(torch.zeros(4, 1, 2, 3), torch.zeros(4).long())
    a, b = er.make_batch(batch, plain, state, network()), er.make_batch(batch, mirrored, state, network())
    assert torch.equal(a.y, b.y) and torch.equal(a.x[4:].flip(-1), b.x[4:]) and not torch.equal(a.x, b.x)
    assert torch.equal(b.x[:4], batch.x)  # the loader has augmented the new ones
    half = context(1, {2: 9}, augment=(Flip(0.5),))
    again = context(1, {2: 9}, augment=(Flip(0.5),))
    first, second = er.make_batch(batch, half, state, network()), er.make_batch(batch, half, state, network())
    assert torch.equal(first.x, er.make_batch(batch, again, state, network()).x) and not torch.equal(first.x, second.x)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_memory_survives_a_checkpoint_and_says_its_size(selection):
    er, stream = ER(memory=5, selection=selection), [{0: 9, 1: 4}, {2: 9}]
    states = run(er, stream)
    file = io.BytesIO()
    torch.save(encode(states[1]), file)
    file.seek(0)
    loaded = decode(torch.load(file, weights_only=True), network())
    again = er.after_experience(network(), context(1, stream[1], offset=1000), loaded)
    straight = er.after_experience(network(), context(1, stream[1], offset=1000), states[1])
    assert again.keys() == straight.keys() and again.get("owner") == straight.get("owner")
    if selection != "herding":  # the images that the two moments hold differ in all but their number
        assert numbers(again) == numbers(straight)
    kept = len(states[1]["y"])
    assert nbytes(states[1]) == kept * (6 * 4 + 8 + 8)


def test_other_targets_are_kept_beside_their_samples():
    policy, memory = MemoryPolicy(4), MemoryPolicy(4).empty()
    for index, sizes in enumerate([{0: 5, 1: 5}, {2: 5, 3: 5}]):
        now = context(index, sizes, offset=1000 * index)
        part, width = now.experience.samples, 2 * (index + 1)

        def logits(fresh, part=part, width=width):
            return {"logits_MKC": part.x[fresh][:, :, 0, :1].expand(-1, 3, width)}

        memory = policy.update(
            memory, now.experience, generator=now.generator, features=lambda index: index, targets=logits
        )
    assert memory["logits_MKC"].shape == (4, 3, 4)
    for number, y, logits_KC in zip(numbers(memory), memory["y"].tolist(), memory["logits_MKC"], strict=True):
        width = 2 if y < 2 else 4
        assert bool((logits_KC[:, :width] == number).all())
        assert bool(torch.isneginf(logits_KC[:, width:]).all())


@pytest.mark.parametrize("selection", ["random", "reservoir"])
def test_selections_that_know_no_classes_have_no_budget_for_them(selection):
    with pytest.raises(ConfigError, match=rf"components.er.budget: found per_class with selection {selection}"):
        ER(budget="per_class", selection=selection)
    ER(memory=2, selection=selection).check(classes=10)


def test_which_memories_must_have_room_for_every_class():
    ER(memory=1, budget="per_class").check(classes=10)
    with pytest.raises(ConfigError, match=r"components.er.memory: found 9 for 10 classes"):
        ER(memory=9, selection="herding").check(classes=10)


def test_options_come_from_a_config():
    given = {"selection": "herding", "budget": "per_class", "replay": "fixed", "replayed": 16}
    assert ER(**check_options(ER, given, where="components.er")) == ER(**given)
    with pytest.raises(ConfigError, match="components.er.selection: found 'herdin'.*did you mean 'herding'"):
        check_options(ER, {"selection": "herdin"}, where="components.er")
    with pytest.raises(ConfigError, match="components.er.replayed: found 0; give at least 1 sample"):
        ER(replayed=0)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("replay", ["extra", "fixed"])
def test_every_policy_trains_and_repeats(selection, replay):
    data = TensorSamples(torch.rand(24, 1, 2, 3), torch.arange(24) % 4, augment=(Flip(),))
    stream = class_incremental(Source("s", data, data, classes=4), experiences=2, order="sorted")

    def weights():
        torch.manual_seed(0)
        net = Network(BACKBONES.get("mlp")((1, 2, 3), width=5))
        er = ER(memory=6, selection=selection, replay=replay, replayed=3)
        module = ContinualModule(net, er, optimizer=partial(torch.optim.SGD, lr=0.1), seed=1)
        loop = LightningStrategy(model=module, benchmark=stream, train_mb_size=5, evaluator=None)
        for experience in stream.avalanche.train_stream:
            loop.train(experience)
        assert len(module.learner.state["er"]["y"]) == 6
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    first = weights()
    assert bool(torch.isfinite(first).all()) and torch.equal(first, weights())
