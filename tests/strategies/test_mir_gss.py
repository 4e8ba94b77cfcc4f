"""MIR and GSS: the formulas of their papers longhand, and runs that use them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import Source, TensorSamples, class_incremental
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.heads import CosineLinear
from clframe.seeding import generator_for
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import GSS, MIR
from strategies.gss import greedy_selection, sample_gradients
from strategies.mir import interference

SHAPE = (1, 2, 2)


def network(exits=0, backbone="mlp", shape=SHAPE, classes=3):
    torch.manual_seed(0)
    options = {"width": 5} if backbone == "mlp" else {}
    net = Network(BACKBONES.get(backbone)(shape, **options), exits=[("layer1", GrowingLinear(5)) for _ in range(exits)])
    net.grow(range(classes))
    return net


def context(samples, seed=0):
    return StepContext(Experience(1, 3, (2,), (0, 1), (), samples), 0, 1, generator_for(seed))


def data(count, seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    return TensorSamples(torch.randn(count, *shape, generator=generator) + y.reshape(-1, 1, 1, 1), y, mean=(0.5,), std=(2.0,))


def sample_loss(net, x, y):
    """loss_N of every sample, summed over exits, one at a time."""
    return torch.stack([
        sum(cross_entropy(logits, y[i : i + 1]) for logits in net(x[i : i + 1]).logits) for i in range(len(y))
    ])  # fmt: skip


# --- MIR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [0, 2])
def test_interference_is_the_rise_of_the_loss_in_a_step_of_gradient_descent(exits):
    net, new, old = network(exits), data(4), data(6, seed=1)
    found = interference(net, new.x, new.y, old.x, old.y, lr=0.3)
    with torch.no_grad():
        before = sample_loss(net, old.x, old.y)
    loss = sum(cross_entropy(logits, new.y) for logits in net(new.x).logits)
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.3 * parameter.grad
        after = sample_loss(net, old.x, old.y)
    assert not found.requires_grad
    torch.testing.assert_close(found, after - before, rtol=1e-4, atol=1e-6)


def test_interference_leaves_weights_gradients_buffers_and_modes_alone():
    net = network(backbone="resnet20", shape=(1, 8, 8)).train()
    first = next(iter(net.parameters())).requires_grad_(False)
    new, old = data(4, shape=(1, 8, 8)), data(6, seed=1, shape=(1, 8, 8))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    rise = interference(net, new.x, new.y, old.x, old.y, lr=0.1)
    assert bool(torch.isfinite(rise).all()) and bool((rise != 0).any())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training and not first.requires_grad


@pytest.mark.parametrize("batches", ["joint", "apart"])
def test_the_candidates_with_the_largest_interference_join_the_batch(batches):
    mir, net, new, old = MIR(candidates=8, lr=0.5, batches=batches), network(1), data(3), data(12, seed=2)
    state = {"x": old.x, "y": old.y, "key": torch.zeros(12, dtype=torch.float64)}
    index = torch.randperm(12, generator=generator_for(0))[:8]
    prepared = old.prepare(old.x[index])
    rise = interference(net, new.x, new.y, prepared, old.y[index], lr=0.5)
    batch = mir.make_batch(Batch(new.x, new.y), context(old), state, net)
    chosen = rise.argsort(descending=True)[:3]
    assert torch.equal(batch.x[:3], new.x) and torch.equal(batch.y[3:], old.y[index][chosen])
    torch.testing.assert_close(batch.x[3:], prepared[chosen])
    assert batch.weight_B is None and batch.parts == ((3, 3) if batches == "apart" else ())


def test_while_the_buffer_is_small_all_of_it_is_replayed_and_nothing_while_it_is_empty():
    mir, net, new, old = MIR(), network(), data(5), data(2, seed=2)
    state = {"x": old.x, "y": old.y, "key": torch.zeros(2, dtype=torch.float64)}
    batch = mir.make_batch(Batch(new.x, new.y), context(old), state, net)
    assert len(batch.y) == 7 and sorted(batch.y[5:].tolist()) == sorted(old.y.tolist())
    alone = Batch(new.x, new.y)
    assert mir.make_batch(alone, context(old), mir.init_state(net), net) is alone


# --- GSS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits, cosine", [(0, False), (2, False), (1, True)])
def test_sample_gradients_are_those_of_every_sample_by_itself(exits, cosine):
    net, samples = network(exits, classes=0 if cosine else 3), data(4)
    if cosine:  # whose scale is a weight without dimensions
        net.classify_with(partial(CosineLinear, scale=3.0))
        net.grow(range(3))
    found = sample_gradients(net, samples.x, samples.y)
    for row, x, y in zip(found, samples.x, samples.y, strict=True):
        loss = sum(cross_entropy(logits, y[None]) for logits in net(x[None]).logits)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in gradients]), rtol=1e-4, atol=1e-6)


def test_sample_gradients_use_running_statistics_and_leave_the_network_alone():
    net, samples = network(backbone="resnet20", shape=(1, 8, 8)).train(), data(3, shape=(1, 8, 8))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = sample_gradients(net, samples.x, samples.y)
    alone = sample_gradients(net, samples.x[:1], samples.y[:1])
    torch.testing.assert_close(found[:1], alone, rtol=1e-3, atol=1e-5)  # no sample depends on the others
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training and all(parameter.grad is None for parameter in net.parameters())


def longhand_selection(C, new, size, generator):
    """Algorithm 2 of the paper for one sample after the other: (what each slot holds, its scores)."""
    held, C = list(range(-len(C), 0)), list(C)
    room = min(size - len(C), len(new))
    draw, decision = torch.rand(2, len(new), generator=generator, dtype=torch.float64).tolist()
    for number, c in enumerate(new):
        if number < room:
            held.append(number)
            C.append(c)
        elif c < 1:
            target, slot = draw[number] * sum(C), 0
            while slot < len(C) - 1 and sum(C[: slot + 1]) < target:
                slot += 1
            if decision[number] < C[slot] / (C[slot] + c):
                held[slot], C[slot] = number, c
    return held, C


@pytest.mark.parametrize("stored, size", [(0, 5), (3, 5), (5, 5), (8, 8)])
def test_selection_is_algorithm_2(stored, size):
    replaced = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        score_M = 2 * torch.rand(stored, generator=generator, dtype=torch.float64)
        score_N = 2 * torch.rand(7, generator=generator, dtype=torch.float64)
        slot_N, after_M = greedy_selection(score_M, score_N, size, generator=generator_for(seed))
        held, expected = longhand_selection(score_M.tolist(), score_N.tolist(), size, generator_for(seed))
        torch.testing.assert_close(after_M, torch.tensor(expected, dtype=torch.float64))
        found = list(range(-stored, 0)) + [None] * (len(held) - stored)
        for number, slot in enumerate(slot_N.tolist()):
            if slot >= 0:
                found[slot] = number
        assert found == held
        replaced += sum(number >= size - stored for number in held)
    assert replaced > 5


def test_similar_samples_never_replace_and_scores_of_zero_can_be_drawn():
    score_M = torch.zeros(3, dtype=torch.float64)
    slot_N, after_M = greedy_selection(score_M, torch.tensor([1.0, 1.7]).double(), 3, generator=generator_for(0))
    assert slot_N.tolist() == [-1, -1] and torch.equal(after_M, score_M)
    slot_N, _ = greedy_selection(score_M, torch.tensor([0.5]).double(), 3, generator=generator_for(0))
    assert slot_N.tolist() == [-1]  # C / (C + c) is 0


def test_scores_that_are_not_numbers_replace_nothing():
    score_M, score_N = torch.full((3,), math.nan, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    slot_N, after_M = greedy_selection(score_M, score_N, 3, generator=generator_for(0))
    assert slot_N.tolist() == [-1] * 4 and after_M.isnan().all()


def test_scores_are_one_plus_the_largest_cosine_with_stored_samples():
    gss, net, old, new = GSS(memory=9, compared=4), network(1), data(5, seed=3), data(2)
    state = {"x": old.x, "y": old.y, "score": torch.full((5,), 0.7, dtype=torch.float64)}
    step = Step(Batch(new.prepare(new.x), new.y, stored=lambda: new.x), None, context(new), net)
    after = gss.after_step(net, step, state)
    index = torch.randint(5, (4,), generator=generator_for(0))
    new_N = sample_gradients(net, new.prepare(new.x), new.y)
    old_J = sample_gradients(net, old.prepare(old.x[index]), old.y[index])
    for i in range(2):
        expected = 1 + max(float(cosine_similarity(new_N[i], old_J[j], dim=0)) for j in range(4))
        assert float(after["score"][5 + i]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(after["x"], torch.cat([old.x, new.x])) and torch.equal(after["y"], torch.cat([old.y, new.y]))
    first = gss.after_step(net, step, gss.init_state(net))
    assert first["score"].tolist() == [1.0, 1.0] and torch.equal(first["x"], new.x)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["mir(memory=12, candidates=8, lr=0.1)", "gss(memory=12, compared=4)"])
@pytest.mark.parametrize("replay", ["extra", "half"])
def test_a_run_replays_old_classes_from_a_buffer_of_stored_inputs(strategy, replay):
    y = torch.arange(4).repeat(15)
    x = torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 1] = torch.arange(len(y)), 60 * y.to(torch.uint8)
    samples = TensorSamples(x, y, mean=(60.0,), std=(50.0,))
    benchmark = class_incremental(Source("numbered", samples, samples, classes=4), experiences=2, order="sorted")
    module = ContinualModule(
        network(classes=0), strategy[:-1] + f", replay='{replay}')", optimizer=partial(torch.optim.SGD, lr=0.05), seed=1
    )
    seen = set()
    loop = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=6, train_epochs=2, evaluator=None)
    loop.on_step = lambda strategy: seen.add(frozenset(strategy.mb_y.tolist()))
    for experience in benchmark.avalanche.train_stream:
        loop.train(experience)
    (state,) = module.learner.state.values()
    number_M = state["x"][:, 0, 0, 0].long()
    assert len(state["y"]) == 12 and state["x"].dtype == torch.uint8
    assert torch.equal(state["x"], x[number_M]) and torch.equal(state["y"], y[number_M])
    assert any({0, 1} & classes and {2, 3} & classes for classes in seen)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def test_a_loader_without_stored_inputs_is_refused():
    samples, net = data(3), network()
    step = Step(Batch(samples.x, samples.y), net(samples.x), context(samples), net)
    for component in (MIR(), GSS()):
        with pytest.raises(UnsupportedError, match=rf"components\.{component.name}\.update: found step, but the loader"):
            component.after_step(net, step, component.init_state(net))


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: MIR(candidates=0), "mir.candidates"),
        (lambda: MIR(lr=0.0), "mir.lr"),
        (lambda: MIR(memory=0), "mir.memory"),
        (lambda: MIR(selection="balanced"), "mir.update"),
        (lambda: GSS(compared=0), "gss.compared"),
        (lambda: GSS(ratio=0.0), "gss.ratio"),
    ],
)
def test_impossible_options(make, key):
    with pytest.raises(ConfigError, match=f"components.{key}"):
        make()
