"""BiC: what it trains on, what it corrects, and that it helps."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import clframe
from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import TensorSamples, class_incremental
from clframe.data.source import SOURCES
from clframe.errors import ConfigError
from clframe.functional.class_incremental import fit_bias
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.seeding import generator_for
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import BiC


def context(index, classes, past, per_class=12):
    y = torch.tensor([c for c in classes for _ in range(per_class)])
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(len(y), 1, 2, 2, generator=generator) + y.reshape(-1, 1, 1, 1)
    experience = Experience(index, 5, tuple(classes), tuple(past), (), TensorSamples(x, y))
    return StepContext(experience, 0, 1, generator_for(0, index))


def learnt(bic, exits):
    """After a first experience with classes 0 and 1, in a second one with 2, its heads drawn anew."""
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=5), exits=[("layer1", GrowingLinear(5)) for _ in range(exits)])
    net.grow([0, 1])
    first = context(0, (0, 1), ())
    state = bic.after_experience(net, first, bic.before_experience(net, first, bic.init_state(net)))
    net.grow([2])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    now = context(1, (2,), (0, 1))
    return net, now, bic.before_experience(net, now, state)


@pytest.mark.parametrize("exits", [0, 2])
@pytest.mark.parametrize("lamb, weights", [(None, (1 / 3, 2 / 3)), (2.0, (1.0, 2.0)), (0.0, (1.0, 0.0))])
def test_the_mixed_loss_longhand(exits, lamb, weights):
    bic = BiC(memory=20, lamb=lamb, temperature=3.0)
    net, now, state = learnt(bic, exits)
    x, y = torch.randn(4, 1, 2, 2), torch.tensor([2, 0, 2, 1])
    # As if classes 0 and 1 had been corrected after the first experience, each exit by a pair of its own.
    state["alpha_KC"][:, :2] = torch.arange(1.0, exits + 2)[:, None] / 2
    state["beta_KC"][:, :2] = -0.25
    step = Step(Batch(x, y), net(x), now, net)
    terms = {"task/ce": bic.task_loss(step, state), "bic/distill": bic.losses(step, state)["distill"]}
    assert all(term.shape == (exits + 1,) for term in terms.values())
    expected = 0.0
    for k in range(exits + 1):
        a = (k + 1) / 2
        z, t = net(x).logits[k], state["teacher"](x).logits[k]
        corrected = torch.cat([a * z[:, :2] - 0.25, z[:, 2:]], 1)
        ce = cross_entropy(corrected, y)
        q, log_p = ((a * t - 0.25) / 3).softmax(1), (corrected[:, :2] / 3).log_softmax(1)
        kd = (q * (q.log() - log_p)).sum(1).mean()
        torch.testing.assert_close(terms["task/ce"][k], ce)
        torch.testing.assert_close(terms["bic/distill"][k], kd)
        expected = expected + weights[0] * ce + weights[1] * kd
    mixed = bic.combine_losses({**terms, "other": torch.tensor(5.0)}, step, state)
    torch.testing.assert_close(mixed.squeeze(), expected + 5)


def test_the_first_experience_is_plain():
    bic = BiC(memory=20)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=5))
    net.grow([0, 1])
    now = context(0, (0, 1), ())
    state = bic.before_experience(net, now, bic.init_state(net))
    x, y = now.experience.samples.x[:3], now.experience.samples.y[:3]
    step = Step(Batch(x, y), net(x), now, net)
    assert bic.losses(step, state) == {}
    task = bic.task_loss(step, state)
    assert torch.equal(task[0], cross_entropy(net(x).last, y)) and torch.equal(bic.combine_losses({"task/ce": task}, step, state), task)
    after = bic.after_experience(net, now, state)
    assert after["alpha_KC"].tolist() == [[1, 1]] and after["beta_KC"].tolist() == [[0, 0]]


@pytest.mark.parametrize("exits", [0, 2])
def test_each_exit_has_a_pair_of_its_own_fitted_on_held_out_samples(exits):
    bic = BiC(memory=30, held_out=0.4, decay=0.01)
    net, now, state = learnt(bic, exits)
    after = bic.after_experience(net, now, state)
    held = after["held"]
    assert sorted(held["y"].tolist()) == [0] * 4 + [1] * 4 + [2] * 4  # ceil(0.4 * (30 // 3 - 1))
    with torch.no_grad():
        logits = net.eval()(held["x"]).logits
    for k in range(exits + 1):
        pair = fit_bias(logits[k], held["y"], new=(2,), decay=0.01)
        assert after["alpha_KC"][k].tolist() == pytest.approx([1, 1, pair[0]])
        assert after["beta_KC"][k].tolist() == pytest.approx([0, 0, pair[1]])
    assert exits == 0 or after["alpha_KC"][0, 2] != after["alpha_KC"][-1, 2]
    output = net(now.experience.samples.x)
    for k, answer in enumerate(bic.adjust_logits(output, after).logits):
        expected = output.logits[k].clone()
        expected[:, 2] = after["alpha_KC"][k, 2] * expected[:, 2] + after["beta_KC"][k, 2]
        torch.testing.assert_close(answer, expected)
    net.grow([3])  # the next experience's class is not corrected
    later = bic.before_experience(net, context(2, (3,), (0, 1, 2)), after)
    assert later["alpha_KC"][:, 3].tolist() == [1] * (exits + 1)


def test_an_epoch_sees_neither_part_that_is_held_out():
    bic = BiC(memory=30, held_out=0.4)
    _, now, state = learnt(bic, 0)
    pool, size = bic.training_set(now.experience.samples, 7, state)
    counts = torch.bincount(pool.y).tolist()
    assert size == 7 and counts == [7, 7, 8]  # ceil(0.4 * 11) of 12 held out at first; now ceil(0.4 * 9)


@pytest.mark.parametrize(
    "options, key",
    [
        ({"memory": 0}, "memory"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.0}, "held_out"),
        ({"lamb": -1.0}, "lamb"),
        ({"temperature": 0.0}, "temperature"),
        ({"decay": 0.0}, "decay"),
    ],
)
def test_impossible_options(options, key):
    with pytest.raises(ConfigError, match=rf"components\.bic\.{key}: found"):
        BiC(**options)


def accuracies(strategy, *, exits=0):
    """Of every exit on all digits after three experiences, and of the raw logits."""
    source = SOURCES.get("digits")()
    stream = class_incremental(source, experiences=3, order="sorted")
    torch.manual_seed(0)
    heads = [("layer1", GrowingLinear(64)) for _ in range(exits)]
    net = Network(BACKBONES.get("mlp")(stream.input_shape, width=64), exits=heads)
    module = ContinualModule(net, strategy, optimizer=partial(torch.optim.SGD, lr=0.1), seed=0)
    loop = LightningStrategy(model=module, benchmark=stream, train_mb_size=32, train_epochs=2, evaluator=None)
    for experience in stream.avalanche.train_stream:
        loop.train(experience)
    test = source.test
    with torch.no_grad():
        output = net.eval()(test.prepare(test.x), taps=module.learner.taps)
    parts = module.learner.adjust_logits(output), output
    return [[(z.argmax(1) == test.y).float().mean().item() for z in part.logits] for part in parts]


def test_the_correction_helps_at_every_exit_on_digits():
    corrected, raw = accuracies(BiC(memory=100), exits=2)
    naive, _ = accuracies(clframe.parse("naive"), exits=2)
    assert len(corrected) == 3
    for k in range(3):
        assert corrected[k] > raw[k] + 0.02 and corrected[k] > naive[k] + 0.3


def test_a_run_that_was_stopped_goes_on_the_same(tmp_path):
    options = ["strategy=bic", "components.bic.memory=40", "backbone=mlp", "backbone.width=16", "trainer.epochs=1"]
    whole = clframe.run("quickstart", [*options, "trainer.progress=false"], output=tmp_path)
    folder = tmp_path / "again"
    shutil.copytree(whole.run_folder, folder)
    for name in ("results.json", "checkpoints/experience_005.ckpt"):
        (folder / name).unlink()
    assert clframe.run(resume=folder).accuracy_matrix == whole.accuracy_matrix
