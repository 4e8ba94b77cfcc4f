"""What an exit's loss depends on, how strongly, and the estimates that are not that."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.data import TensorSamples
from clframe.exits import make_head
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.backbones import Backbone
from clframe.regularization.sensitivity import objectives, sensitivities

CLASSES = 3


def network(exits=2, backbone="small_cnn"):
    torch.manual_seed(1)
    net = Network(BACKBONES.get(backbone)((1, 8, 8), width=4))
    taps = list(net.backbone.names[:exits])
    net.attach([(tap, make_head("auto", net.backbone.tap_shapes[tap])) for tap in taps])
    net.grow(range(CLASSES))
    return net


def samples(count=7):
    generator = torch.Generator().manual_seed(2)
    return TensorSamples(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % CLASSES)


def measure(net, data, **options):
    scope = options.pop("scope", "exit")
    base = {"loss": F.cross_entropy, "power": 2, "generator": torch.Generator().manual_seed(0)}
    return sensitivities(net, data, measured=objectives(net, scope=scope), **{**base, **options})


def longhand(net, data, exits, *, labels=None):
    """The mean over samples of squared gradients, by one backward pass each."""
    net.eval()
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for b in range(len(data)):
        net.zero_grad()
        y = data.y[b : b + 1] if labels is None else labels[b : b + 1]
        sum(F.cross_entropy(net(data.x[b : b + 1]).logits[k], y) for k in exits).backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad**2 / len(data)
    net.zero_grad()
    return sums


def agree(found, expected):
    assert all(torch.allclose(value, expected[name], rtol=1e-4, atol=1e-9) for name, value in found.items())
    left_out = [value for name, value in expected.items() if name not in found]
    assert all(value.abs().max() == 0 for value in left_out)  # an exit depends on nothing behind it


def test_each_exit_has_its_own_fisher_below_its_tap():
    net, data = network(), samples()
    found = measure(net, data, batch_size=3)
    assert len(found) == 3
    for exit, fisher in enumerate(found):
        agree(fisher, longhand(net, data, [exit]))
    assert set(found[0]) == {"backbone.stages.0.0.weight", "backbone.stages.0.0.bias"} | {
        f"heads.0.{name}" for name, _ in net.heads[0].named_parameters()
    }
    assert not any(name.startswith(("heads.0", "heads.1")) for name in found[2])
    assert {name for name in found[2] if name.startswith("backbone")} == {
        f"backbone.{n}" for n, _ in net.backbone.named_parameters()
    }


def test_last_and_total():
    net, data = network(), samples()
    agree(measure(net, data, scope="last")[0], longhand(net, data, [2]))
    (total,) = measure(net, data, scope="total")
    agree(total, longhand(net, data, [0, 1, 2]))
    assert set(total) == {name for name, _ in net.named_parameters()}


def test_one_exit_is_no_special_case():
    net, data = network(exits=0), samples(1)
    for scope in ("exit", "last", "total"):
        agree(measure(net, data, scope=scope)[0], longhand(net, data, [0]))


def test_free_heads_and_frozen_weights_are_left_out():
    net = network()
    assert all(
        name.startswith("backbone") for _, names in objectives(net, scope="exit", heads="free") for name in names
    )
    net.backbone.stages[0].requires_grad_(False)
    assert not any(".stages.0." in name for _, names in objectives(net, scope="exit") for name in names)


def test_the_network_is_left_as_it_was_and_normalization_uses_its_statistics():
    backbone = [("conv", nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten()), (72,))]
    net = Network(Backbone(backbone, input_shape=(1, 8, 8)))
    net.grow(range(CLASSES))
    net.train()
    data, before = samples(), {k: v.clone() for k, v in net.state_dict().items()}
    found = measure(net, data)
    assert net.training and all(module.training for module in net.modules())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    agree(found[0], longhand(net, data, [0]))


def test_predicted_labels_are_each_exits_own():
    net, data = network(), samples()
    net.eval()
    logits = [x.argmax(1) for x in net(data.x).logits]
    for exit, fisher in enumerate(measure(net, data, labels="predicted")):
        agree(fisher, longhand(net, data, [exit], labels=logits[exit]))


def test_sampled_labels_approach_the_expectation_under_the_model():
    net, data = network(exits=0), samples(1)
    net.eval()
    chance = net(data.x).last.softmax(1)[0].tolist()
    each = [longhand(net, data, [0], labels=torch.tensor([c])) for c in range(CLASSES)]
    many = TensorSamples(data.x.expand(600, -1, -1, -1), data.y.expand(600))
    (found,) = measure(net, many, labels="sampled", batch_size=100)
    name = "heads.0.bias"
    expected = sum(chance[c] * each[c][name] for c in range(CLASSES))
    assert torch.allclose(found[name], expected, rtol=0.2)
    assert not torch.allclose(found[name], each[0][name], rtol=0.2)


def test_a_limit_takes_as_many_samples():
    net, data = network(exits=0), samples(9)
    index = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:4]
    agree(measure(net, data, limit=4)[0], longhand(net, data.subset(index), [0]))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_and_the_published_defect(batch_size):
    """Squared gradients of batch means; divided after every batch, all but the last fall by another factor N."""
    net, data = network(exits=0), samples(7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    net.eval()
    squares = []
    for index in order.split(batch_size):
        net.zero_grad()
        F.cross_entropy(net(data.x[index]).last, data.y[index]).backward()
        squares.append(len(index) * net.final.weight.grad**2)
    net.zero_grad()
    name = "heads.0.weight"
    (batches,) = measure(net, data, estimate="batches", batch_size=batch_size)
    assert torch.allclose(batches[name], sum(squares) / 7, rtol=1e-4)
    expected = torch.zeros_like(squares[0])
    for square in squares:
        expected = (expected + square) / 7
    (published,) = measure(net, data, estimate="published", batch_size=batch_size)
    assert torch.allclose(published[name], expected, rtol=1e-4)


def test_the_published_estimate_is_as_many_times_too_small_as_there_are_batches():
    net = network(exits=0, backbone="mlp")
    data = samples(60)
    sums = {}
    for estimate in ("batches", "published"):
        orders = [torch.Generator().manual_seed(seed) for seed in range(10)]
        found = [measure(net, data, estimate=estimate, batch_size=3, generator=g)[0] for g in orders]
        sums[estimate] = sum(v.sum().item() for fisher in found for v in fisher.values())
    assert 14 < sums["batches"] / sums["published"] < 28  # 20 batches; which one comes last is chance


def test_batches_of_one_are_samples():
    net, data = network(), samples(4)
    for a, b in zip(measure(net, data), measure(net, data, estimate="batches", batch_size=1), strict=True):
        agree(a, b)


def test_frozen_gradient_modes_are_those_of_training():
    net, data = network(), samples(3)
    net.gradient = "detached"
    found = measure(net, data)
    assert all(v.abs().max() == 0 for k, v in found[0].items() if k.startswith("backbone"))
    net.gradient = "equilibrium"  # a custom autograd function, which goes one by one
    agree(measure(net, data)[0], longhand(net, data, [0]))


@pytest.mark.parametrize("backbone", ["small_cnn", "resnet20", "vit_tiny"])
def test_common_backbones_take_many_samples_at_once(backbone, monkeypatch):
    """No operation of theirs, or of their exits' heads, falls back to one sample after the other."""
    monkeypatch.setattr("clframe.regularization.importance.gradient_sums_by_loop", None)
    torch.manual_seed(0)
    net = Network(BACKBONES.get(backbone)((3, 32, 32)))
    tap = net.backbone.names[1]
    net.attach([(tap, make_head("auto", net.backbone.tap_shapes[tap], per_experience=True))])
    net.grow(range(CLASSES))
    data = TensorSamples(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))
    (first, _) = measure(net, data)
    agree(first, longhand(net, data, [0]))


def test_growing_linear_gaps():
    net = Network(BACKBONES.get("mlp")((1, 8, 8), width=4), exits=[("layer1", GrowingLinear(4))])
    net.grow([0, 2])
    data = TensorSamples(torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 0, 2]))
    for fisher in measure(net, data):
        assert all(bool(torch.isfinite(v).all()) for v in fisher.values())
