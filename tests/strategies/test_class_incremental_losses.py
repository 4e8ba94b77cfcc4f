"""SS-IL, LODE, iCaRL and nearest class means: what they do to a step and to an answer."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import clframe
from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import TensorSamples, class_incremental
from clframe.data.source import SOURCES
from clframe.errors import ComposeError, ConfigError
from clframe.exits import make_head
from clframe.functional.losses import distillation
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.types import Output
from clframe.seeding import generator_for
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import ER, LODE, NCM, SSIL, ICaRL


def context(index, classes, past, *, memory=None, per_class=5):
    y = torch.tensor([c for c in classes for _ in range(per_class)])
    x = torch.randn(len(y), 1, 2, 2, generator=torch.Generator().manual_seed(index)) + y.reshape(-1, 1, 1, 1)
    experience = Experience(index, 5, tuple(classes), tuple(past), (), TensorSamples(x, y, mean=(1.0,), std=(2.0,)))
    return StepContext(experience, 0, 1, generator_for(0, index), memory)


def second_experience(component, exits, *, memory=None):
    """The network and the state after classes 0 and 1, heads grown for 2 and 3 and all weights moved."""
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=5), exits=[("layer1", GrowingLinear(5)) for _ in range(exits)])
    net.grow([0, 1])
    state = component.after_experience(net, context(0, (0, 1), (), memory=memory), component.init_state(net))
    net.grow([2, 3])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net, state


def step_of(net, y=(3, 0, 2, 1, 1), weight_B=None, past=(0, 1)):
    y = torch.tensor(y)
    x = torch.randn(len(y), 1, 2, 2)
    return Step(Batch(x, y, weight_B), net(x, taps=net.exit_taps), context(1, (2, 3), past), net)


@pytest.mark.parametrize("exits", [0, 2])
def test_ssil_longhand(exits):
    ssil = SSIL(lamb=0.5, temperature=3.0)
    net, state = second_experience(ssil, exits)
    step = step_of(net)
    task_K, distill_K = ssil.task_loss(step, state), ssil.losses(step, state)["distill"]
    teacher = state["teacher"](step.batch.x).logits
    for k, z in enumerate(step.output.logits):
        new, old = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
        ce = 2 * cross_entropy(z[new, 2:], step.batch.y[new] - 2) + 3 * cross_entropy(z[old, :2], step.batch.y[old])
        torch.testing.assert_close(task_K[k], ce / 5)
        q, log_p = (teacher[k] / 3).softmax(1), (z[:, :2] / 3).log_softmax(1)
        torch.testing.assert_close(distill_K[k], 0.5 * 9 * (q * (q.log() - log_p)).sum(1).mean())
    assert ssil.after_experience(net, step.context, state)["groups"] == ((0, 1), (2, 3))
    assert SSIL(lamb=0.0).losses(step, state) == {}


def test_ssil_treats_a_class_that_returns_as_new_only():
    ssil = SSIL()
    net, state = second_experience(ssil, 0)
    step = step_of(net)
    again = replace(step, context=context(1, (2, 3), (0, 1, 2)))
    assert torch.equal(ssil.task_loss(again, state), ssil.task_loss(step, state))


def test_ssil_distils_each_old_experience_under_a_softmax_of_its_own():
    ssil = SSIL(lamb=1.0)
    net, state = second_experience(ssil, 0)
    state = ssil.after_experience(net, context(1, (2, 3), (0, 1)), state)
    net.grow([4])
    with torch.no_grad():
        net.final.weight.add_(torch.randn_like(net.final.weight))
    x = torch.randn(3, 1, 2, 2)
    step = Step(Batch(x, torch.tensor([4, 0, 2])), net(x), context(2, (4,), (0, 1, 2, 3)), net)
    teacher = state["teacher"](x)
    expected = distillation(step.output.logits, teacher.logits, groups=[(0, 1), (2, 3)], temperature=2.0)
    assert torch.equal(ssil.losses(step, state)["distill"], expected)


@pytest.mark.parametrize("exits", [0, 2])
def test_lode_longhand(exits):
    lode = LODE(c=4.0, rho=0.5)
    net, state = second_experience(lode, exits)
    step = step_of(net, y=(3, 0, 2, 1, 1), weight_B=torch.tensor([1.0, 0.5, 1.0, 0.5, 0.5]))
    for k, z in enumerate(step.output.logits):
        new, old = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
        inner = cross_entropy(z[new, 2:], step.batch.y[new] - 2)
        outer = -z[new].softmax(1)[:, 2:].sum(1).log().mean()
        expected = 4 * inner + 0.5 * (2 / 2) * outer + 0.5 * cross_entropy(z[old], step.batch.y[old])
        torch.testing.assert_close(lode.task_loss(step, state)[k], expected)


@pytest.mark.parametrize("component", [LODE(), SSIL()])
def test_the_first_experience_is_the_plain_cross_entropy(component):
    net, _ = second_experience(component, 2)
    net.grow(range(4))
    step = step_of(net, y=(3, 2, 2), past=())
    first = Step(step.batch, Output(tuple(z[:, 2:] for z in step.output.logits)), context(0, (0, 1), ()), net)
    shifted = Step(Batch(step.batch.x, step.batch.y - 2), first.output, first.context, net)
    found = component.task_loss(shifted, component.init_state(net))
    expected = torch.stack([cross_entropy(z, step.batch.y - 2) for z in first.output.logits])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("exits", [0, 2])
def test_icarl_longhand(exits):
    icarl = ICaRL(lamb=0.7)
    net, state = second_experience(icarl, exits)
    step = step_of(net)
    task_K, distill_K = icarl.task_loss(step, state), icarl.losses(step, state)["distill"]
    teacher = state["teacher"](step.batch.x).logits
    hot = torch.nn.functional.one_hot(step.batch.y, 4).float()[:, 2:]
    for k, z in enumerate(step.output.logits):
        p, q = z.sigmoid(), teacher[k].sigmoid()
        bce = -(hot * p[:, 2:].log() + (1 - hot) * (1 - p[:, 2:]).log()).sum(1).mean()
        kd = -(q * p[:, :2].log() + (1 - q) * (1 - p[:, :2]).log()).sum(1).mean()
        torch.testing.assert_close(task_K[k], bce)
        torch.testing.assert_close(distill_K[k], 0.7 * kd)
        softmax = ICaRL(loss="softmax").task_loss(step, state)
        torch.testing.assert_close(softmax[k], cross_entropy(z, step.batch.y))
    assert icarl.losses(step, icarl.init_state(net)) == {}


def memory_of(classes, samples=7):
    y = torch.tensor([c for c in classes for _ in range(samples)])
    return {"x": torch.randn(len(y), 1, 2, 2, generator=torch.Generator().manual_seed(5)) + y.reshape(-1, 1, 1, 1), "y": y}


@pytest.mark.parametrize("component, sharpness", [(ICaRL(), 1.0), (NCM(sharpness=3.0), 3.0)])
@pytest.mark.parametrize("exits", [0, 2])
def test_each_exit_answers_by_the_means_of_the_memory_in_its_own_features(exits, component, sharpness):
    memory = memory_of((0, 1))
    net, state = second_experience(component, exits)
    assert tuple(component.taps(net)) == (("layer1", net.exit_taps[-1]) if exits else net.exit_taps)
    state = component.after_experience(net, context(1, (0, 1), (), memory=memory), component.init_state(net))
    x = torch.randn(6, 1, 2, 2)
    output = net.eval()(x, taps=component.taps(net))
    answers = component.adjust_logits(output, state)
    stored = net((memory["x"] - 1) / 2, taps=net.exit_taps).taps
    for k, tap in enumerate(net.exit_taps):
        means = [normalize(normalize(stored[tap][memory["y"] == c], dim=1).mean(0), dim=0) for c in (0, 1)]
        f = normalize(output.taps[tap], dim=1)
        expected = torch.stack([-sharpness * (f - mu).square().sum(1) for mu in means], 1)
        torch.testing.assert_close(answers.logits[k][:, :2], expected, rtol=1e-4, atol=1e-5)
        assert answers.logits[k].shape == (6, 4) and (answers.logits[k][:, 2:] == -math.inf).all()
        assert torch.isfinite(answers.logits[k].softmax(1)).all()
    assert answers.taps is output.taps


@pytest.mark.parametrize("component", [ICaRL(), NCM()])
def test_before_there_are_means_logits_answer(component):
    net, _ = second_experience(component, 0)
    output = net(torch.randn(2, 1, 2, 2), taps=component.taps(net))
    assert all(a is b for a, b in zip(component.adjust_logits(output, component.init_state(net)).logits, output.logits, strict=True))


def test_one_sample_of_a_class_is_its_mean():
    ncm, net = NCM(), second_experience(NCM(), 0)[0]
    state = ncm.after_experience(net, context(1, (2, 3), (0, 1), per_class=1), ncm.init_state(net))
    assert state["known_C"].tolist() == [False, False, True, True]
    assert state["sums"][0][2:].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_without_a_memory_means_are_those_of_training_and_stay():
    ncm, net = NCM(), second_experience(NCM(), 0)[0]
    first = context(0, (0, 1), ())
    state = ncm.after_experience(net, first, ncm.init_state(net))
    before = state["sums"][0][:2].clone()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3)
    state = ncm.after_experience(net, context(1, (2, 3), (0, 1)), state)
    assert torch.equal(state["sums"][0][:2], before) and state["known_C"].tolist() == [True] * 4
    again = ncm.after_experience(net, context(2, (1,), (0, 1, 2, 3)), state)  # class 1 comes back: its mean runs on
    assert torch.equal(again["sums"][0][[0, 2, 3]], state["sums"][0][[0, 2, 3]])
    assert again["sums"][0][1].norm() > state["sums"][0][1].norm()
    known = ncm.after_experience(net, context(3, (0,), (0, 1, 2, 3), memory=memory_of((0, 2))), again)
    only = ncm.after_experience(net, context(3, (0,), (), memory=memory_of((0, 2))), ncm.init_state(net))
    assert torch.equal(known["sums"][0][[0, 2]], only["sums"][0][[0, 2]])
    assert torch.equal(known["sums"][0][[1, 3]], again["sums"][0][[1, 3]])


@pytest.mark.parametrize("name", ["ssil", "lode", "icarl"])
def test_they_need_a_memory(name):
    with pytest.raises(ComposeError, match=f"'{name}' needs a memory; add one"):
        clframe.parse(name).check_needs()
    clframe.parse(f"er + {name}").check_needs()


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: SSIL(lamb=-1.0), "ssil.lamb"),
        (lambda: SSIL(temperature=0.0), "ssil.temperature"),
        (lambda: LODE(c=-1.0), "lode.c"),
        (lambda: LODE(rho=math.nan), "lode.rho"),
        (lambda: ICaRL(lamb=-0.5), "icarl.lamb"),
        (lambda: NCM(sharpness=0.0), "ncm.sharpness"),
    ],
)
def test_impossible_options(make, key):
    with pytest.raises(ConfigError, match=rf"components\.{key}: found"):
        make()


def accuracies(*components, exits=2, classes=10):
    """Of every exit on the first ``classes`` of ten digits after three experiences, of 4, 3 and 3 classes."""
    source = SOURCES.get("digits")()
    stream = class_incremental(source, experiences=3, order="sorted")
    torch.manual_seed(0)
    heads = [("layer1", GrowingLinear(64)) for _ in range(exits)]
    net = Network(BACKBONES.get("mlp")(stream.input_shape, width=64), exits=heads)
    strategy = clframe.compose(*components)
    module = ContinualModule(net, strategy, optimizer=partial(torch.optim.SGD, lr=0.1), seed=0)
    loop = LightningStrategy(model=module, benchmark=stream, train_mb_size=32, train_epochs=2, evaluator=None)
    for experience in stream.avalanche.train_stream:
        loop.train(experience)
    test = source.test.subset((source.test.y < classes).nonzero().flatten())
    with torch.no_grad():
        output = net.eval()(test.prepare(test.x), taps=module.learner.taps)
    return [(z.argmax(1) == test.y).float().mean().item() for z in module.learner.adjust_logits(output).logits]


@pytest.mark.slow
def test_on_digits_every_exit_does_what_it_is_for():
    """A small memory, few epochs: LODE, iCaRL and nearest means know more, SS-IL forgets less."""
    er = ER(memory=40, replay="fixed", replayed=8)
    replay, lode = accuracies(er), accuracies(er, LODE())
    icarl = accuracies(ER(memory=40, replay="concatenate", selection="herding"), ICaRL())
    means, naive = accuracies(NCM()), accuracies()
    replay_old, ssil_old = accuracies(er, classes=7), accuracies(er, SSIL(), classes=7)
    for k in range(3):
        assert lode[k] > replay[k] + 0.01 and icarl[k] > replay[k] + 0.01
        assert means[k] > naive[k] + 0.2
        assert ssil_old[k] > replay_old[k] + 0.01


@pytest.mark.parametrize("strategy", [
    "er(memory=40) + icarl + lwf", pytest.param("er(memory=40) + ncm + ssil", marks=pytest.mark.slow),
    pytest.param("er(memory=40) + lode", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_that_was_stopped_goes_on_the_same(strategy, tmp_path):
    options = [f"strategy={strategy}", "backbone=mlp", "backbone.width=16", "trainer.epochs=1", "trainer.loggers=[csv]",
               "benchmark.classes=6", "benchmark.experiences=3"]  # fmt: skip
    whole = clframe.run("quickstart", [*options, "trainer.progress=false"], output=tmp_path)
    folder = tmp_path / "again"
    shutil.copytree(whole.run_folder, folder)
    for name in ("results.json", "checkpoints/experience_003.ckpt"):
        (folder / name).unlink()
    assert clframe.run(resume=folder).accuracy_matrix == whole.accuracy_matrix


@pytest.mark.parametrize("scores", ["squared", "fourth"])
def test_icarl_with_max_pooled_maps_at_exits_and_distances_to_the_fourth(scores):
    icarl = ICaRL(pooling="max", scores=scores)
    torch.manual_seed(0)
    backbone = BACKBONES.get("small_cnn")((1, 8, 8), width=3)
    tap = backbone.names[0]
    channels = backbone.tap_shapes[tap][0]
    net = Network(backbone, exits=[(tap, make_head("pool", backbone.tap_shapes[tap]))])
    net.grow([0, 1])
    y = torch.tensor([0, 0, 0, 1, 1])
    memory = {"x": torch.randn(5, 1, 8, 8) + y.reshape(-1, 1, 1, 1), "y": y}
    samples = TensorSamples(memory["x"], y)
    now = StepContext(Experience(0, 2, (0, 1), (), (), samples), 0, 1, generator_for(0), memory)
    state = icarl.after_experience(net, now, icarl.init_state(net))
    output = net.eval()(torch.randn(6, 1, 8, 8), taps=icarl.taps(net))
    found = icarl.adjust_logits(output, state)
    stored = net(memory["x"], taps=net.exit_taps).taps
    for k, name in enumerate(net.exit_taps):
        def features(tap, k=k):
            if k == 1:  # the last exit averages, as the network's own classifier does
                return normalize(tap.mean((2, 3)) if tap.ndim == 4 else tap, dim=1)
            rows, columns = tap.shape[2] // 2, tap.shape[3] // 2
            blocks = tap[:, :, : 2 * rows, : 2 * columns].reshape(len(tap), channels, rows, 2, columns, 2)
            return normalize(blocks.amax((3, 5)).flatten(1), dim=1)

        means = [normalize(features(stored[name])[y == c].mean(0), dim=0) for c in (0, 1)]
        squared = torch.stack([(features(output.taps[name]) - mu).square().sum(1) for mu in means], 1)
        expected = -squared if scores == "squared" else -(squared**2)
        torch.testing.assert_close(found.logits[k], expected, rtol=1e-3, atol=1e-5)
