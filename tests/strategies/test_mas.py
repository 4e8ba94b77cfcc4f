"""MAS: importances and penalty longhand, merging, exits, and Avalanche's numbers."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import clframe
from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import TensorSamples
from clframe.data.avalanche import import_avalanche
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from strategies import MAS


def network(exits=0, classes=2):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=4), exits=[("layer1", GrowingLinear(4)) for _ in range(exits)])
    net.grow(range(classes))
    return net


def context(index, classes, past=(), count=6):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(index))
    samples = TensorSamples(x, torch.tensor([classes[i % len(classes)] for i in range(count)]))
    return StepContext(Experience(index, 3, tuple(classes), tuple(past), (), samples), 0, 1, generator_for(0, index))


def penalty(mas, net, now, state):
    x, y = now.experience.samples.x, now.experience.samples.y
    return mas.losses(Step(Batch(x, y), net(x), now, net), mas.before_experience(net, now, state))["penalty"]


def learnt(mas, net, now, state):
    return mas.after_experience(net, now, mas.before_experience(net, now, state))


def move(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def sensitivity(net, now, exit):
    """The mean over samples of |d (squared norm of the logits)|."""
    net.eval()
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x in now.experience.samples.x:
        net.zero_grad()
        (net(x[None]).logits[exit] ** 2).sum().backward()
        for name, p in net.named_parameters():
            sums[name] += 0 if p.grad is None else p.grad.abs() / len(now.experience.samples)
    net.zero_grad()
    return sums


@pytest.mark.parametrize("merge", ["average", "sum"])
@pytest.mark.parametrize("exits", [0, 2])
def test_the_penalty_of_each_exit_after_two_experiences(merge, exits):
    mas, net = MAS(lamb=3.0, merge=merge, alpha=0.25), network(exits)
    first = context(0, (0, 1))
    state = learnt(mas, net, first, mas.init_state(net))
    old = [sensitivity(net, first, k) for k in range(exits + 1)]
    net.grow(range(4))
    move(net)
    second = context(1, (2, 3), (0, 1))
    new = [sensitivity(net, second, k) for k in range(exits + 1)]
    anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = learnt(mas, net, second, state)
    move(net)
    term_K = penalty(mas, net, second, state)
    assert term_K.shape == (exits + 1,)
    a, b = (0.25 * 0.75, 0.75) if merge == "average" else (1, 1)
    for k in range(exits + 1):
        expected = torch.zeros(())
        for name, p in net.named_parameters():
            importance = b * new[k][name]
            importance[tuple(slice(n) for n in old[k][name].shape)] += a * old[k][name]
            expected = expected + (importance * (p - anchor[name]) ** 2).sum()
        assert torch.allclose(term_K[k], 3 * expected, rtol=1e-4)


def test_labels_play_no_part():
    mas, net, now = MAS(), network(1), context(0, (0, 1))
    a = learnt(mas, net, now, mas.init_state(net))
    now = context(0, (0, 1))
    now.experience.samples.y.zero_()
    b = learnt(mas, net, now, mas.init_state(net))
    assert all(torch.equal(x["importance"], y["importance"]) for x, y in zip(a["terms"], b["terms"], strict=True))


def test_importances_and_penalty_are_avalanches_on_batches_of_one():
    import_avalanche()
    from avalanche.training.plugins import MASPlugin
    from avalanche.training.utils import copy_params_dict

    mas, net, now = MAS(lamb=4.0, alpha=0.5), network(), context(0, (0, 1), count=7)
    samples = now.experience.samples
    state = learnt(mas, net, now, mas.init_state(net))
    module = ContinualModule(net, optimizer=partial(torch.optim.SGD, lr=0.1))
    strategy = SimpleNamespace(
        model=module,
        experience=SimpleNamespace(dataset=torch.utils.data.TensorDataset(samples.x, samples.y, torch.zeros(7))),
        train_mb_size=1,
        device="cpu",
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        clock=SimpleNamespace(train_exp_counter=1),
        loss=torch.ones(()),
    )
    # Both merge with alpha, but Avalanche takes the first importances whole and ours, like FACIL, halves them here.
    plugin = MASPlugin(lambda_reg=4.0, alpha=0.5)
    plugin.importance, plugin.params = plugin._get_importance(strategy), dict(copy_params_dict(module))
    theirs = torch.cat([value.data.flatten() for value in plugin.importance.values()])
    assert torch.allclose(state["terms"][0]["importance"], 0.5 * theirs, rtol=1e-4)
    move(net)
    plugin.before_backward(strategy)
    assert torch.allclose(penalty(mas, net, now, state)[0], 0.5 * (strategy.loss - 1), rtol=1e-4)
    # On larger batches Avalanche takes the gradient of the batch's mean, where signs cancel: never larger.
    strategy.train_mb_size = 7
    whole = torch.cat([value.data.flatten() for value in plugin._get_importance(strategy).values()])
    strategy.train_mb_size = 1
    single = torch.cat([value.data.flatten() for value in plugin._get_importance(strategy).values()])
    assert (whole <= single + 1e-6).all() and whole.sum() < 0.95 * single.sum()


def test_a_state_from_a_checkpoint_goes_on_alike():
    mas, net, now = MAS(scope="total"), network(1), context(0, (0, 1))
    state = learnt(mas, net, now, mas.init_state(net))
    net.grow((0, 1, 2))
    move(net)
    later = context(1, (2,), (0, 1))
    a, b = (penalty(mas, net, later, s) for s in (state, decode(encode(state), net)))
    assert torch.equal(a, b) and a.shape == () and a > 0


def test_preset_builds(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("defaults: [benchmark/digits, backbone/small_cnn, strategy/mas]\n")
    assert "loss/mas/penalty" in clframe.explain(str(file))


@pytest.mark.parametrize(
    "option", [{"lamb": -1.0}, {"alpha": math.nan}, {"samples": -1}, {"batch_size": 0}, {"ceiling": -1.0}]
)
def test_impossible_options(option):
    with pytest.raises(ConfigError, match=f"components.mas.{next(iter(option))}"):
        MAS(**option)
