"""ANCL: two teachers longhand, the auxiliary network's training, and its cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import clframe
from clframe.core import Batch, Experience, Step, StepContext
from clframe.data import TensorSamples
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.frozen import fine_tune
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from strategies import ANCL


def network(exits=0, classes=2):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=6), exits=[("layer1", GrowingLinear(6)) for _ in range(exits)])
    net.grow(range(classes))
    return net


def context(index, classes, past=(), count=10, epochs=1):
    targets = torch.tensor([classes[i % len(classes)] for i in range(count)])
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(index)) + targets[:, None]
    experience = Experience(index, 3, tuple(classes), tuple(past), (), TensorSamples(x, targets))
    return StepContext(experience, 0, epochs, generator_for(0, index))


def losses(ancl, net, now, state):
    x, y = now.experience.samples.x, now.experience.samples.y
    return ancl.losses(Step(Batch(x, y), net(x), now, net), state)


def begun(ancl, exits=0):
    """A network in its third experience: classes 0 to 2 are old, 3 and 4 new."""
    net, state, past = network(exits), ancl.init_state(None), ()
    for index, classes in enumerate([(0, 1), (2,), (3, 4)]):
        net.grow((*past, *classes))
        now = context(index, classes, past)
        state = ancl.before_experience(net, now, state)
        if index < 2:
            state, past = ancl.after_experience(net, now, state), (*past, *classes)
    return net, now, state


@pytest.mark.parametrize("exits", [0, 2])
@pytest.mark.parametrize("softmax", ["joint", "per_experience"])
def test_both_terms_at_every_exit(exits, softmax):
    ancl = ANCL(lamb=2.0, lamb_a=3.0, temperature=2.0, softmax=softmax, epochs=3)
    net, now, state = begun(ancl, exits)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    found = losses(ancl, net, now, state)
    x = now.experience.samples.x
    with torch.no_grad():
        student, old, new = (model(x).logits for model in (net, state["teacher"], state["auxiliary"]))

    def divergence(teacher, k, columns):
        p = (teacher[k][:, columns] / 2).softmax(1)
        return (p * (p.log() - (student[k][:, columns] / 2).log_softmax(1))).sum(1).mean()

    groups = [[0, 1, 2]] if softmax == "joint" else [[0, 1], [2]]
    assert found["distill"].shape == found["auxiliary"].shape == (exits + 1,)
    for k in range(exits + 1):
        expected = 2 * sum(divergence(old, k, group) for group in groups)
        assert torch.allclose(found["distill"][k], expected, rtol=1e-3, atol=1e-6)
        assert torch.allclose(found["auxiliary"][k], 3 * divergence(new, k, [3, 4]), rtol=1e-3, atol=1e-6)


def test_no_terms_in_the_first_experience_and_none_of_weight_zero():
    ancl, net, now = ANCL(), network(), context(0, (0, 1))
    state = ancl.before_experience(net, now, ancl.init_state(net))
    assert losses(ancl, net, now, state) == {} and ancl.extra_cost(net, state) == {"auxiliary_steps": 0}
    net, now, state = begun(ANCL(lamb_a=0.0))
    assert set(losses(ANCL(lamb_a=0.0), net, now, state)) == {"distill"} and state["auxiliary"] is None
    net, now, state = begun(ANCL(lamb=0.0))
    assert set(losses(ANCL(lamb=0.0), net, now, state)) == {"auxiliary"}


def test_the_auxiliary_network_learns_the_new_classes_and_its_steps_are_counted():
    ancl = ANCL(epochs=20, batch_size=4, lr=0.02)
    net, now, state = begun(ancl)
    x, y = now.experience.samples.x, now.experience.samples.y
    before, after = (F.cross_entropy(model(x).last[:, 3:], y - 3).item() for model in (net, state["auxiliary"]))
    assert after < 0.7 * before
    assert not any(p.requires_grad for p in state["auxiliary"].parameters())
    assert ancl.extra_cost(net, state)["auxiliary_steps"] == 2 * 20 * 3  # two experiences of 10 samples in batches of 4
    assert ancl.after_experience(net, now, state)["auxiliary"] is None
    as_long = ANCL(batch_size=10)
    later = context(2, (3, 4), (0, 1, 2), epochs=7)
    assert as_long.before_experience(net, later, {**state, "auxiliary_steps": 0})["auxiliary_steps"] == 7


def test_fine_tuning_is_sgd_and_leaves_everything_else_alone():
    net, now = network(1, classes=4), context(1, (2, 3), (0, 1), count=3)
    options = {"classes": (2, 3), "epochs": 2, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 8}
    before, state = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()
    learnt, steps = fine_tune(net, now.experience.samples, **options, generator=generator_for(3))
    again, _ = fine_tune(net, now.experience.samples, **options, generator=generator_for(3))
    assert steps == 2 and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(learnt.parameters(), again.parameters(), strict=True))
    plain = network(1, classes=4)
    for _ in range(2):  # longhand
        logits = plain(now.experience.samples.x).logits
        loss = sum(F.cross_entropy(scores[:, 2:], now.experience.samples.y - 2) for scores in logits)
        for p, g in zip(plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            p.data -= 0.1 * g
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(learnt.parameters(), plain.parameters(), strict=True))


def test_state_round_trips_with_both_networks():
    ancl = ANCL()
    net, now, state = begun(ancl, 1)
    a, b = losses(ancl, net, now, state), losses(ancl, net, now, decode(encode(state), net))
    assert all(torch.equal(a[term], b[term]) for term in ("distill", "auxiliary"))


@pytest.mark.parametrize("preset", ["ancl", "ancl_paper"])
def test_presets_build(preset, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"defaults: [benchmark/digits, backbone/small_cnn, strategy/{preset}]\n")
    assert "loss/ancl/auxiliary" in clframe.explain(str(file))


@pytest.mark.parametrize(
    "option",
    [{"lamb": -1.0}, {"lamb_a": math.nan}, {"temperature": 0.0}, {"epochs": -1}, {"lr": 0.0}, {"momentum": 1.0},
     {"weight_decay": -1.0}, {"batch_size": 0}, {"milestones": (0.5, 1.0)}, {"clip": 0.0}],
)  # fmt: skip
def test_impossible_options(option):
    with pytest.raises(ConfigError, match=f"components.ancl.{next(iter(option))}"):
        ANCL(**option)


def test_the_auxiliary_networks_rate_falls_in_steps_and_its_gradients_are_clipped():
    net, now = network(classes=4), context(1, (2, 3), (0, 1), count=3)
    options = {"classes": (2, 3), "epochs": 5, "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 8}
    learnt, _ = fine_tune(net, now.experience.samples, **options, milestones=(0.4, 0.8), clip=0.01, generator=generator_for(3))
    plain = network(classes=4)
    for lr in (0.5, 0.5, 0.05, 0.05, 0.005):  # longhand: after 2 and after 4 of 5 epochs
        scores = plain(now.experience.samples.x).last[:, 2:]
        loss = F.cross_entropy(scores, now.experience.samples.y - 2)
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 0.01
        for p, g in zip(plain.parameters(), gradients, strict=True):
            p.data -= lr * g * 0.01 / norm
    for a, b in zip(learnt.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_paper_preset_reaches_the_auxiliary_network(monkeypatch):
    from strategies import ancl as module

    seen = {}
    monkeypatch.setattr(module, "fine_tune", lambda network, samples, **options: (seen.update(options), (network, 1))[1])
    begun(ANCL(milestones=(0.3, 0.6), clip=1.0, lr=0.1))
    assert (seen["milestones"], seen["clip"], seen["lr"]) == ((0.3, 0.6), 1.0, 0.1)
