"""EWC: penalties longhand, growing heads, modes, exits, Avalanche's numbers, and what it does to a run."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import clframe
from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import SOURCES, TensorSamples
from clframe.data.avalanche import import_avalanche
from clframe.data.streams import permuted_stream
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.regularization.sensitivity import objectives, sensitivities
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import EWC


def network(exits=0, classes=2):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=4), exits=[("layer1", GrowingLinear(4)) for _ in range(exits)])
    net.grow(range(classes))
    return net


def context(index, classes, past=(), count=6):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(index))
    samples = TensorSamples(x, torch.tensor([classes[i % len(classes)] for i in range(count)]))
    return StepContext(Experience(index, 3, tuple(classes), tuple(past), (), samples), 0, 1, generator_for(0, index))


def step(net, now):
    samples = now.experience.samples
    return Step(Batch(samples.x, samples.y), net(samples.x), now, net)


def move(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def fisher(net, now, exit):
    net.eval()
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x, y in zip(now.experience.samples.x, now.experience.samples.y, strict=True):
        net.zero_grad()
        F.cross_entropy(net(x[None]).logits[exit], y[None]).backward()
        for name, p in net.named_parameters():
            sums[name] += 0 if p.grad is None else p.grad**2 / len(now.experience.samples)
    net.zero_grad()
    return sums


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def put(net, values):
    for name, p in net.named_parameters():
        p.data.copy_(values[name])


def longhand(net, importance, anchor):
    """Penalty over old rows only: new ones have no anchor."""
    total = torch.zeros(())
    for name, p in net.named_parameters():
        if name in anchor:
            old = tuple(slice(n) for n in anchor[name].shape)
            total = total + (importance[name] * (p[old] - anchor[name]) ** 2).sum()
    return total


@pytest.mark.parametrize("mode", ["separate", "online", "merged"])
@pytest.mark.parametrize("exits", [0, 2])
def test_the_penalty_of_each_exit_over_three_experiences(mode, exits):
    ewc, net = EWC(lamb=3.0, mode=mode, gamma=0.5, alpha=0.25), network(exits)
    state, past, kept = ewc.init_state(net), (), []
    for index, classes in enumerate([(0, 1), (2,), (3, 4)]):
        net.grow((*past, *classes))
        now = context(index, classes, past)
        state = ewc.before_experience(net, now, state)
        assert ("penalty" in ewc.losses(step(net, now), state)) == (index > 0)
        move(net)
        if index == 2:
            break
        kept.append(([fisher(net, now, k) for k in range(exits + 1)], weights(net)))
        state, past = ewc.after_experience(net, now, state), (*past, *classes)
    term_K = ewc.losses(step(net, now), state)["penalty"]
    assert term_K.shape == (exits + 1,)
    for k in range(exits + 1):
        (first, w1), (second, w2) = ((f[k], w) for f, w in kept)
        if mode == "separate":
            expected = longhand(net, first, w1) + longhand(net, second, w2)
        else:
            a, b = (0.5, 1.0) if mode == "online" else (0.25 * 0.75, 0.75)
            importance = {n: b * v for n, v in second.items()}
            for name, value in first.items():
                importance[name][tuple(slice(n) for n in value.shape)] += a * value
            expected = longhand(net, importance, w2)
        assert torch.allclose(term_K[k], 1.5 * expected, rtol=1e-4)
    net.zero_grad()
    term_K[0].backward()
    rows = net.final.weight.grad
    assert (rows is None or rows.abs().max() == 0) if exits else rows[3:].abs().max() == 0 < rows[:3].abs().max()


def test_scopes():
    net, now = network(2), context(0, (0, 1))
    for scope, shape in (("exit", (3,)), ("last", ()), ("total", ())):
        ewc = EWC(scope=scope, lamb=2.0)
        state = ewc.after_experience(net, now, ewc.before_experience(net, now, ewc.init_state(net)))
        before = weights(net)
        move(net)
        term = ewc.losses(step(net, now), ewc.before_experience(net, now, state))["penalty"]
        assert term.shape == shape
        put(net, before)
        if scope == "last":
            importance = fisher(net, now, 2)
            move(net)
            assert torch.allclose(term, longhand(net, importance, before), rtol=1e-4)
            put(net, before)


def test_at_the_old_weights_there_is_no_penalty_and_no_pull():
    ewc, net, now = EWC(lamb=1e6), network(1), context(0, (0, 1))
    state = ewc.before_experience(net, now, ewc.after_experience(net, now, ewc.before_experience(net, now, ewc.init_state(net))))
    term = ewc.losses(step(net, now), state)["penalty"]
    term.sum().backward()
    assert term.tolist() == [0, 0] and all(p.grad.abs().max() == 0 for p in net.parameters())


def test_ceiling_and_divergence():
    net, now = network(), context(0, (0, 1))
    ewc = EWC(ceiling=1e-3)
    state = ewc.after_experience(net, now, ewc.before_experience(net, now, ewc.init_state(net)))
    assert math.isclose(state["terms"][0]["importance"].max().item(), 1e-3, rel_tol=1e-6)
    net.final.weight.data.fill_(torch.inf)
    with pytest.raises(ConfigError, match=r"components.ewc.lamb: found a value with which training diverged"):
        ewc.after_experience(net, now, ewc.before_experience(net, now, ewc.init_state(net)))


def test_importances_and_penalty_are_avalanches_on_batches_of_one():
    import_avalanche()
    from avalanche.training.plugins import EWCPlugin
    from avalanche.training.utils import copy_params_dict

    net, now = network(), context(0, (0, 1), count=7)
    samples = now.experience.samples
    measured = {"measured": objectives(net, scope="exit"), "loss": F.cross_entropy, "power": 2}
    (ours,) = sensitivities(net, samples, **measured, generator=generator_for(0))
    module = ContinualModule(net, optimizer=partial(torch.optim.SGD, lr=0.1))
    data = torch.utils.data.TensorDataset(samples.x, samples.y, torch.zeros(7))
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)

    def theirs(batch_size):
        found = EWCPlugin(1.0).compute_importances(module, F.cross_entropy, sgd, data, "cpu", batch_size)
        return {name.removeprefix("network."): value.data for name, value in found.items()}

    assert all(torch.allclose(ours[name], value, rtol=1e-4) for name, value in theirs(1).items())
    # On larger batches it squares mean gradients, which is `batches` here and much smaller than the Fisher diagonal.
    (batches,) = sensitivities(net, samples, **measured, estimate="batches", batch_size=7, generator=generator_for(0))
    whole = theirs(7)
    assert all(torch.allclose(batches[name], value, rtol=1e-3, atol=1e-8) for name, value in whole.items())
    assert sum(v.sum() for v in whole.values()) < 0.8 * sum(v.sum() for v in ours.values())

    plugin, ewc = EWCPlugin(5.0), EWC(lamb=10.0)  # it has no factor 1/2
    strategy = SimpleNamespace(
        model=module, device="cpu", loss=torch.zeros(()), clock=SimpleNamespace(train_exp_counter=1)
    )
    plugin.importances[0] = EWCPlugin(1.0).compute_importances(module, F.cross_entropy, sgd, data, "cpu", 1)
    plugin.saved_params[0] = copy_params_dict(module)
    state = ewc.after_experience(net, now, ewc.before_experience(net, now, ewc.init_state(net)))
    move(net)
    plugin.before_backward(strategy)
    term = ewc.losses(step(net, now), ewc.before_experience(net, now, state))["penalty"]
    assert torch.allclose(term[0], strategy.loss, rtol=1e-4)


def run(strategy, *, experiences=2):
    """Accuracy on each domain after two of permuted digits."""
    source = SOURCES.get("digits")()
    stream = permuted_stream(source, experiences=experiences, seed=0)
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")(stream.input_shape, width=32))
    module = ContinualModule(net, strategy, optimizer=partial(torch.optim.Adam, lr=2e-3), seed=0)
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=16, train_epochs=2, eval_mb_size=512, evaluator=None
    )
    for experience in stream.avalanche.train_stream:
        loop.train(experience)
    net.eval()
    parts = [(data.prepare(data.raw(torch.arange(len(data)))), data.y) for data in stream.test]
    return [(net(x).last.argmax(1) == y).float().mean().item() for x, y in parts]


def test_it_forgets_less_than_fine_tuning_and_learns_less():
    (old, new), (old_ewc, new_ewc) = run("naive"), run(EWC(lamb=100.0, samples=300))
    assert old_ewc > old + 0.1 and new_ewc < new - 0.1


def test_a_state_from_a_checkpoint_goes_on_alike():
    ewc, net, now = EWC(), network(1), context(0, (0, 1))
    state = ewc.after_experience(net, now, ewc.before_experience(net, now, ewc.init_state(net)))
    loaded = decode(encode(state), net)
    net.grow((0, 1, 2))
    move(net)
    later = context(1, (2,), (0, 1))
    a, b = (ewc.losses(step(net, later), ewc.before_experience(net, later, s))["penalty"] for s in (state, loaded))
    assert torch.equal(a, b) and a.min() > 0


@pytest.mark.parametrize(
    ("preset", "strategy"), [("ewc", "ewc"), ("ewc_online", "ewc"), ("ewc_paper", "ewc + current_classes")]
)
def test_presets_build(preset, strategy, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"defaults: [benchmark/digits, backbone/small_cnn, strategy/{preset}]\n")
    assert clframe.load_config(str(file)).strategy == strategy
    assert "loss/ewc/penalty" in clframe.explain(str(file))


@pytest.mark.parametrize(
    "option",
    [{"lamb": -1.0}, {"gamma": 1.5}, {"alpha": math.nan}, {"samples": -1}, {"batch_size": 0}, {"ceiling": 0.0}],
)
def test_impossible_options(option):
    with pytest.raises(ConfigError, match=f"components.ewc.{next(iter(option))}"):
        EWC(**option)


@pytest.mark.parametrize("heads", ["covered", "free"])
def test_with_block_an_early_exit_covers_the_stage_it_is_attached_to(heads):
    """Two exits on ``layer2`` of three stages and the last one, which covers the whole backbone."""
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=4, depth=3), exits=[("layer2", GrowingLinear(4)) for _ in range(2)])
    net.grow(range(2))
    ewc, now = EWC(lamb=3.0, scope="block", heads=heads), context(0, (0, 1))
    state = ewc.before_experience(net, now, ewc.init_state(net))
    importance, anchor = [fisher(net, now, k) for k in range(3)], weights(net)
    state = ewc.after_experience(net, now, state)
    move(net)
    later = context(1, (0, 1), (0, 1))
    term_K = ewc.losses(step(net, later), ewc.before_experience(net, later, state))["penalty"]
    for k in range(3):
        covered = ("backbone.",) if k == 2 else ("backbone.stages.1.",)
        covered += (f"heads.{k}.",) if heads == "covered" else ()
        chosen = {name: value for name, value in anchor.items() if name.startswith(covered)}
        assert len(chosen) == (6 if k == 2 else 2) + 2 * (heads == "covered")
        torch.testing.assert_close(term_K[k], 1.5 * longhand(net, importance[k], chosen), rtol=1e-4, atol=1e-7)
