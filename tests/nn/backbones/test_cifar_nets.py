"""WideResNet and VGG: the published sizes, the taps of the papers, and their blocks written longhand."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.backbones import vgg11, vgg13, vgg16, vgg19, wide_resnet, wrn16_2
from clframe.nn.backbones.cifar_resnets import PreactivationBlock


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("depth", "widen", "millions"), [(40, 1, 0.6), (16, 4, 2.7), (16, 8, 11.0), (28, 10, 36.5)])
def test_wide_resnets_have_the_sizes_of_the_paper(depth, widen, millions):
    """Zagoruyko and Komodakis, tables 4 and 5, with ten classes; they round, 2.75 down."""
    with torch.device("meta"):
        backbone = wide_resnet((3, 32, 32), depth=depth, widen=widen)
    total = parameters(backbone) + 10 * backbone.features + 10
    assert total / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("widen", [1, 2, 3])
def test_wide_resnet_by_arithmetic(widen):
    c0, c1, c2, c3 = 16, 16 * widen, 32 * widen, 64 * widen
    convolutions = 9 * (3 * c0 + c0 * c1 + 3 * c1 * c1 + c1 * c2 + 3 * c2 * c2 + c2 * c3 + 3 * c3 * c3)
    shortcuts = (c0 * c1 if c0 != c1 else 0) + c1 * c2 + c2 * c3
    norms = 2 * (c0 + 3 * c1 + c1 + 3 * c2 + c2 + 3 * c3 + c3)
    backbone = wide_resnet((3, 32, 32), depth=16, widen=widen)
    assert parameters(backbone) == convolutions + shortcuts + norms
    if widen == 2:
        assert parameters(backbone) == parameters(wrn16_2((3, 32, 32))) == 691_674 - 1290


def test_taps_of_wrn16_2():
    backbone = wrn16_2((3, 32, 31))
    assert backbone.tap_shapes == {
        "stem": (16, 32, 31), "block1.0": (32, 32, 31), "block1.1": (32, 32, 31), "block2.0": (64, 16, 16),
        "block2.1": (64, 16, 16), "block3.0": (128, 8, 8), "block3.1": (128, 8, 8), "pool": (128,),
    }  # fmt: skip


@pytest.mark.parametrize(("channels", "wider", "stride"), [(4, 4, 1), (4, 6, 1), (4, 6, 2)])
def test_preactivation_block_longhand(channels, wider, stride):
    block = PreactivationBlock(channels, wider, stride=stride, dropout=0.0).eval()
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, channels, 7, 7)

    def activated(z, norm):
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        return ((z - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()

    a = activated(x, block.bn1)
    f = F.conv2d(a, block.conv1.weight, stride=stride, padding=1)
    f = F.conv2d(activated(f, block.bn2), block.conv2.weight, padding=1)
    shortcut = x if channels == wider else F.conv2d(a, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), shortcut + f)


def test_the_pool_of_wide_resnet_normalizes_first():
    backbone = wide_resnet((1, 8, 8), depth=10, widen=1).eval()
    x = torch.randn(2, 64, 2, 2) - 0.5
    torch.testing.assert_close(backbone.stages[-1](x), (x / (1 + 1e-5) ** 0.5).relu().mean((2, 3)))


def test_taps_of_vgg19_are_the_paper_s():
    """Outputs of ``features`` 2, 6, 9, ... 52 of torchvision's VGG19-BN, then the two hidden layers."""
    ours = vgg19((3, 32, 32), hidden=24)
    with torch.device("meta"):  # its classifier alone has 120 million weights
        theirs = torchvision.models.vgg19_bn().features
    theirs = theirs.to_empty(device="cpu")
    state = iter(ours.stages[:16].state_dict().values())
    theirs.load_state_dict({key: next(state) for key in theirs.state_dict()})
    indices = (2, 6, 9, 13, 16, 19, 22, 26, 29, 32, 35, 39, 42, 45, 48, 52)
    x = torch.randn(2, 3, 32, 32)
    expected = {}
    with torch.no_grad():
        y = x
        for index, layer in enumerate(theirs.eval()):
            y = layer(y)
            if index in indices:
                expected[index] = y.clone()
        y = x
        for index, stage in zip(indices, ours.eval().stages, strict=False):
            y = stage(y)
            assert torch.equal(y, expected[index])
    assert ours.names == (
        "block1.0", "block1.1", "block2.0", "block2.1", "block3.0", "block3.1", "block3.2", "block3.3", "block4.0",
        "block4.1", "block4.2", "block4.3", "block5.0", "block5.1", "block5.2", "block5.3", "fc1", "fc2", "dropout",
    )  # fmt: skip


@pytest.mark.parametrize(("factory", "convolutions"), [(vgg11, 8), (vgg13, 10), (vgg16, 13), (vgg19, 16)])
def test_vggs_have_as_many_layers_as_their_names_say(factory, convolutions):
    backbone = factory((1, 32, 64), width=2, hidden=5)
    assert sum(isinstance(part, nn.Conv2d) for part in backbone.modules()) == convolutions
    assert len(backbone.names) == convolutions + 3
    assert backbone.tap_shapes[backbone.names[convolutions - 1]] == (16, 1, 2)
    theirs = getattr(torchvision.models, f"{factory.__name__}_bn")
    with torch.device("meta"):
        features = theirs(num_classes=2).features
        ours = factory((3, 32, 32), hidden=7)
    assert sum(parameters(stage) for stage in ours.stages[:convolutions]) == parameters(features)
    assert sum(parameters(stage) for stage in ours.stages[convolutions:]) == 512 * 7 + 7 + 7 * 7 + 7


def test_dropout_stands_in_front_of_the_next_layer_and_not_in_the_tap():
    backbone = vgg11((1, 32, 32), width=1, hidden=64, dropout=0.9).train()
    hidden = torch.rand(8, 64) + 1
    assert (backbone.stages[-1](hidden) == 0).float().mean() > 0.7
    flat = backbone.stages[-3]
    tap = torch.rand(8, 8, 1, 1)
    assert torch.equal(flat(tap), flat.eval()(tap))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wide_resnet((3, 32, 32), depth=17), "wide_resnet.depth: found 17; give 6n \\+ 4"),
        (lambda: wide_resnet((3, 32, 32), depth=4), "wide_resnet.depth: found 4; give 6n \\+ 4"),
        (lambda: wide_resnet((3, 32, 32), widen=0), "wide_resnet.widen: found 0; give 1 or more"),
        (lambda: wrn16_2((3, 32, 32), dropout=-0.1), "wrn16_2.dropout: found -0.1; give 0 or more"),
        (lambda: wrn16_2((3, 2, 2)), "wrn16_2: found images of 2x2; use at least 4x4"),
        (lambda: vgg16((3, 28, 28)), "vgg16: found images of 28x28; use at least 32x32"),
        (lambda: vgg16((3, 32, 32), width=0), "vgg16.width: found 0; give 1 or more"),
        (lambda: vgg16((3, 32, 32), hidden=0), "vgg16.hidden: found 0; give 1 or more"),
        (lambda: vgg16((3, 32, 32), dropout=1), "vgg16.dropout: found 1; give 0 or more"),
    ],
)
def test_impossible_options_are_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()
