"""Fusing batch normalization changes no output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clframe.exits.fusion import SlicedMaxAverage, fuse_batch_norm
from clframe.exits.head_kinds import make_head
from clframe.exits.layers import MaxAveragePool
from clframe.nn import GrowingLinear, Head, Network
from clframe.nn.backbones import Backbone, resnet20, small_cnn, vgg11, wrn16_2


class ConvHead(Head):
    """A convolution, its normalization, the mean and a classifier; cascades."""

    cascades = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.linear = GrowingLinear(6)

    def grow(self, classes):
        return self.linear.grow(classes)

    def forward(self, features, previous_BC=None):
        logits_BC = self.linear(self.layers(features).mean((2, 3)))
        return logits_BC if previous_BC is None else logits_BC + previous_BC.sum(1, keepdim=True)


def lived(network: Network) -> Network:
    """Normalizations with statistics and weights as after training, each channel its own."""
    network.grow(range(5))
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.2)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())


def resnet(shortcut: str) -> Network:
    return Network(
        resnet20((3, 12, 10), width=4, shortcut=shortcut), exits=[("layer1.1", ConvHead(4)), ("layer2.0", ConvHead(8))]
    )


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: resnet("conv"), 0),
        (lambda: resnet("pad"), 0),
        (lambda: Network(vgg11((3, 32, 32), width=4)), 0),
        (lambda: Network(small_cnn((3, 8, 8), width=4)), 0),
    ],
)
def test_a_fused_network_has_the_same_outputs(make, left, memory_format):
    torch.manual_seed(0)
    network = lived(make())
    fast = fuse_batch_norm(network, memory_format=memory_format)
    x = torch.randn(7, *network.input_shape)
    with torch.no_grad():
        for a, b in zip(fast(x).logits, network(x).logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert norms(fast) == left


def test_normalizations_before_a_convolution_stay():
    torch.manual_seed(0)
    network = lived(Network(wrn16_2((3, 8, 8))))
    before = norms(network)
    fast = fuse_batch_norm(network)
    assert 0 < norms(fast) < before
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(fast(x).last, network(x).last, rtol=1e-5, atol=1e-5)


def test_the_original_is_left_alone_and_the_copy_is_frozen():
    network = resnet("conv")
    network.grow([0, 1])
    state = copy.deepcopy(network.state_dict())
    network.train()
    fast = fuse_batch_norm(network, memory_format="channels_last")
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(part.training for part in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast.backbone.stages[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network.backbone.stages[0][0].weight.is_contiguous()
    assert fast.exit_names == network.exit_names


class TwoUses(nn.Module):
    """The output of a convolution is used twice, so its normalization must not be fused."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(nn.Module):
    """One normalization behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.one(x)) * self.norm(self.two(x))


class Untraceable(nn.Module):
    """Depends on the values of its input, so it cannot be traced; its child can."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.inner(x if x.sum() > 0 else -x)


class Interrupted(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))


class WithoutStatistics(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))


@pytest.mark.parametrize(
    ("stage", "left"),
    [(TwoUses, 1), (CalledTwice, 1), (Untraceable, 0), (Interrupted, 1), (WithoutStatistics, 1), (Plain, 0)],
)
def test_only_a_convolution_of_its_own_takes_a_normalization_in(stage, left):
    torch.manual_seed(0)
    stages = [("stage", stage(), (4, 2, 2)), ("flat", nn.Flatten(), (16,))]
    network = lived(Network(Backbone(stages, input_shape=(3, 2, 2))))
    fast = fuse_batch_norm(network)
    assert norms(fast) == left
    x = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(fast(x).last, network(x).last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 5), (3, 16, 2, 9), (2, 4, 1, 6), (2, 4, 5, 1), (2, 4, 1, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_by_slices_is_pooling(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format)
    (maximum, average), (expected, mean) = SlicedMaxAverage(least=0)(x), MaxAveragePool()(x)
    assert torch.equal(maximum, expected)
    torch.testing.assert_close(average, mean)


@pytest.mark.parametrize("per_experience", ["one", "each"])
def test_pooling_heads_have_the_same_outputs_in_channels_last(per_experience):
    torch.manual_seed(0)
    backbone = resnet20((3, 12, 10), width=4)
    taps = ("layer1.1", "layer2.0", "layer3.2")
    exits = [(tap, make_head("pool", backbone.tap_shapes[tap], per_experience=per_experience == "each")) for tap in taps]
    network = Network(backbone, exits=exits)
    network.grow([0, 1, 2])
    network.grow([3, 5])
    network = lived(network)
    x = torch.randn(7, 3, 12, 10)
    for memory_format, sliced in (("contiguous", 0), ("channels_last", 3)):
        fast = fuse_batch_norm(network, memory_format=memory_format)
        for part in fast.modules():
            if isinstance(part, SlicedMaxAverage):
                part.least = 0
        for a, b in zip(fast(x).logits, network(x).logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert sum(isinstance(part, SlicedMaxAverage) for part in fast.modules()) == sliced
