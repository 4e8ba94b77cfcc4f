"""SI: the path followed step by step, Avalanche's importances, growing heads, and what it does to a run."""

from __future__ import annotations

import math
from functools import partial

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
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import SI


def network(exits=0, classes=2):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=4), exits=[("layer1", GrowingLinear(4)) for _ in range(exits)])
    net.grow(range(classes))
    return net


def context(index, classes, past=(), count=8):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(index))
    samples = TensorSamples(x, torch.tensor([classes[i % len(classes)] for i in range(count)]))
    return StepContext(Experience(index, 3, tuple(classes), tuple(past), (), samples), 0, 1, generator_for(0, index))


def train(si, net, now, state, *, steps=5, maximize=False, watch=lambda before: None):
    """Full batches with momentum, so that a step is not the gradient's."""
    samples, sgd = now.experience.samples, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, maximize=maximize)
    for _ in range(steps):
        output = net(samples.x)
        step = Step(Batch(samples.x, samples.y), output, now, net)
        task = sum(F.cross_entropy(logits, samples.y) for logits in output.logits)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        sgd.zero_grad()
        task.backward(retain_graph=True)
        gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
        for term in si.losses(step, state).values():
            term.backward()
        sgd.step()
        si.after_step(net, step, state)
        watch((gradients, before))


@pytest.mark.parametrize("exits", [0, 2])
def test_importances_are_the_path_integral_of_the_tasks_gradient(exits):
    si, net, past = SI(c=2.0, damping=0.05), network(exits), ()
    state, importance = si.init_state(net), {}
    for index, classes in enumerate([(0, 1), (2,)]):
        net.grow((*past, *classes))
        now, path = context(index, classes, past), {}
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        state = si.before_experience(net, now, state)

        def follow(seen, path=path):
            gradients, before = seen
            for name, p in net.named_parameters():
                path[name] = path.get(name, 0) - gradients[name] * (p.detach() - before[name])

        train(si, net, now, state, watch=follow)
        for name, p in net.named_parameters():
            old = torch.zeros_like(p)
            if name in importance:
                old[tuple(slice(n) for n in importance[name].shape)] = importance[name]
            moved = p.detach() - start[name]
            importance[name] = torch.relu(old + path[name] / (moved**2 + 0.05))
        state, past = si.after_experience(net, now, state), (*past, *classes)
    found = state["terms"][0]["importance"]
    expected = torch.cat([value.flatten() for value in importance.values()])
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6) and found.max() > 0.1

    anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p += 0.5
    net.grow(range(4))
    later = context(2, (3,), past)
    state = si.before_experience(net, later, state)
    x, y = later.experience.samples.x, later.experience.samples.y
    term = si.losses(Step(Batch(x, y), net(x), later, net), state)
    assert term["penalty"].shape == ()
    assert torch.allclose(term["penalty"], 2 * sum(0.25 * importance[name].sum() for name in anchor), rtol=1e-3)


def test_the_total_path_holds_the_penaltys_own_gradient():
    found = {}
    for path in ("task", "total"):
        si, net, first, second = SI(c=5.0, path=path), network(), context(0, (0, 1)), context(1, (0, 1), (0, 1))
        state = si.before_experience(net, first, si.init_state(net))
        train(si, net, first, state)
        state = si.before_experience(net, second, si.after_experience(net, first, state))
        train(si, net, second, state)
        found[path] = state["path"].clone()
    assert not torch.allclose(found["task"], found["total"], rtol=1e-2)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context")  # numpy squares of tensors, in Avalanche
@pytest.mark.parametrize("uphill", [False, True])
def test_importances_are_avalanches_before_cutting(uphill):
    """On equal steps: Avalanche's are not cut at zero, but at 0.001 from above, and follow the total path."""
    import_avalanche()
    from avalanche.training.plugins.synaptic_intelligence import SynapticIntelligencePlugin as Plugin

    si, net, now = SI(path="total", damping=1e-3), network(), context(0, (0, 1))
    module = ContinualModule(net, optimizer=partial(torch.optim.SGD, lr=0.1))
    names = ("old_theta", "new_theta", "grad", "trajectory", "cum_trajectory")
    ewc_data, syn_data, none = ({}, {}), {name: {} for name in names}, set()
    Plugin.create_syn_data(module, ewc_data, syn_data, none)
    Plugin.init_batch(module, ewc_data, syn_data, none)

    def copied(data):
        """On the CPU Avalanche stores views of the live weights; see clframe.avalanche_bridge.repairs."""
        for value in data.values():
            value.data = value.data.clone()

    copied(ewc_data[0])
    Plugin.pre_update(module, syn_data, none)
    copied(syn_data["old_theta"])

    def follow(_):
        Plugin.post_update(module, syn_data, none)
        Plugin.pre_update(module, syn_data, none)
        copied(syn_data["old_theta"])

    state = si.before_experience(net, now, si.init_state(net))
    train(si, net, now, state, maximize=uphill, watch=follow)
    state = si.after_experience(net, now, state)
    Plugin.update_ewc_data(module, ewc_data, syn_data, math.inf, none, 1, eps=1e-3)
    theirs = torch.cat([ewc_data[1][name].data for name, _ in module.named_parameters()])
    assert torch.allclose(state["terms"][0]["importance"], theirs.relu(), rtol=1e-3, atol=1e-5)
    assert theirs.min() < -0.1 if uphill else theirs.max() > 0.1
    module.network.final.weight.data += 0.5
    penalty = Plugin.compute_ewc_loss(module, ewc_data, none, "cpu", lambd=0.2)  # it has a factor 1/2
    moved = ewc_data[1]["network.heads.0.weight"].data
    assert torch.allclose(penalty, 0.1 * 0.25 * moved.sum(), rtol=1e-3)


def run(strategy):
    stream = permuted_stream(SOURCES.get("digits")(), experiences=2, seed=0)
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
    (old, new), (old_si, new_si) = run("naive"), run(SI(c=30.0))
    assert old_si > old + 0.1 and new_si < new


def test_a_state_from_a_checkpoint_goes_on_alike():
    si, net, now = SI(), network(1), context(0, (0, 1))
    state = si.before_experience(net, now, si.init_state(net))
    train(si, net, now, state)
    state = si.after_experience(net, now, state)
    assert set(state) == {"scopes", "terms"}
    loaded, later = decode(encode(state), net), context(1, (0, 1), (0, 1))
    before, ends = {name: p.detach().clone() for name, p in net.named_parameters()}, []
    for start in (state, loaded):
        for name, p in net.named_parameters():
            p.data.copy_(before[name])
        now_state = si.before_experience(net, later, start)
        train(si, net, later, now_state)
        ends.append(si.after_experience(net, later, now_state)["terms"][0]["importance"])
    assert torch.equal(*ends)


def test_preset_builds(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("defaults: [benchmark/digits, backbone/small_cnn, strategy/si]\n")
    assert "loss/si/penalty" in clframe.explain(str(file))


@pytest.mark.parametrize("option", [{"c": -1.0}, {"c": math.nan}, {"damping": 0.0}, {"ceiling": 0.0}])
def test_impossible_options(option):
    with pytest.raises(ConfigError, match=f"components.si.{next(iter(option))}"):
        SI(**option)


def test_a_step_that_the_loss_scaler_skips_adds_nothing():
    si, net, now = SI(c=2.0), network(), context(0, (0, 1))
    state = si.before_experience(net, now, si.init_state(net))
    train(si, net, now, state, steps=2)
    before = state["path"].clone()
    for value in (math.inf, -math.inf, math.nan):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, value)
        samples = now.experience.samples
        state = si.after_step(net, Step(Batch(samples.x, samples.y), net(samples.x), now, net), state)
    assert torch.equal(state["path"], before)


@pytest.mark.parametrize("strategy", ["si", "mas", "ewc(mode='online')", "agem(memory=20, sample=4)"])
def test_half_precision_runs_whose_first_steps_are_skipped_end_finite(strategy):
    """A scale of 2^40 overflows half precision for many steps; each of them must leave everything as it was."""
    from lightning import Fabric
    from lightning.fabric.plugins import MixedPrecision

    from clframe.data import Source, class_incremental

    torch.manual_seed(0)
    y = torch.arange(4).repeat(20)
    data = TensorSamples(torch.randn(len(y), 5) + y[:, None], y)
    benchmark = class_incremental(Source("blobs", data, data, classes=4), experiences=2, order="sorted")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = ContinualModule(network(classes=0), strategy, optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
    start = [parameter.detach().clone() for parameter in module.network.backbone.parameters()]
    scales, moved = [], []
    loop = LightningStrategy(
        model=module, benchmark=benchmark, train_mb_size=4, train_epochs=4, evaluator=None,
        fabric=Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]),
    )  # fmt: skip

    def note(strategy):
        scales.append(scaler.get_scale())
        now = list(module.network.backbone.parameters())
        moved.append(any(not torch.equal(a, b) for a, b in zip(start, now, strict=True)))

    loop.on_step = note
    for experience in benchmark.avalanche.train_stream:
        loop.train(experience)
    assert scales[0] < 2.0**40 and not moved[0] and moved[-1]  # skipped at first, trained in the end
    values = [*module.parameters(), *(v for t in module.learner.state.get("si", {}).get("terms", ()) for v in (t["importance"],))]
    assert all(bool(torch.isfinite(value).all()) for value in values)
