"""Backbones keep what they declare: tap shapes, sizes by arithmetic, errors in one line."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from itertools import pairwise

import pytest
import torch
from torch import nn

from clframe.errors import ConfigError, UnknownNameError
from clframe.nn.backbones import BACKBONES, Backbone, mlp, resnet20, resnet32, small_cnn
from clframe.nn.backbones.base import load_backbone
from clframe.options import check_options

SMALL_IMAGES = ("mlp", "resnet20", "resnet32", "small_cnn")
SIZES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 33, 31), (2, 9, 14), (5, 4, 7)]
VARIANTS = [
    *((name, {}) for name in SMALL_IMAGES),
    ("small_cnn", {"width": 3, "depth": 1}),
    ("mlp", {"width": 7, "depth": 3}),
    ("resnet20", {"width": 5, "shortcut": "pad"}),
]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_real_taps_have_the_declared_shapes(name, options, shape, batch):
    backbone = BACKBONES.get(name)(shape, **options).eval()
    x = torch.randn(batch, *shape)
    with torch.no_grad():
        real = {}
        y = x
        for stage_name, stage in zip(backbone.names, backbone.stages, strict=True):
            y = stage(y)
            real[stage_name] = tuple(y.shape)
        whole = backbone(x)
    assert real == {tap: (batch, *declared) for tap, declared in backbone.tap_shapes.items()}
    assert whole.shape == (batch, backbone.features)
    assert torch.equal(whole, y)
    assert backbone.input_shape == shape


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_no_stage_writes_into_the_tap_before_it(name):
    backbone = BACKBONES.get(name)((3, 16, 16))
    taps = [torch.randn(4, 3, 16, 16)]
    kept = [taps[0].clone()]
    for stage in backbone.stages:
        taps.append(stage(taps[-1]))
        kept.append(taps[-1].detach().clone())
    assert all(torch.equal(tap, copy) for tap, copy in zip(taps, kept, strict=True))
    taps[-1].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_blocks_of_resnet32_are_the_taps_of_the_papers():
    names = resnet32((3, 32, 32)).names
    assert names == (
        "stem", *(f"layer{layer}.{block}" for layer in (1, 2, 3) for block in range(5)), "pool",
    )  # fmt: skip
    assert {"layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"} <= set(names)
    assert [n for n in resnet20((3, 32, 32)).names if n.startswith("layer3")] == [
        "layer3.0", "layer3.1", "layer3.2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("factory", "shortcut", "classes", "expected"),
    [
        (resnet20, "pad", 10, 269_722),  # 0.27 M in the paper's table 6
        (resnet32, "pad", 10, 464_154),  # 0.46 M there
        (resnet20, "conv", 10, 272_474),
        (resnet32, "conv", 100, 472_756),
    ],
)
def test_resnet_parameters(factory, shortcut, classes, expected):
    blocks = 3 if factory is resnet20 else 5
    w1, w2, w3 = 16, 32, 64
    convolutions = 9 * (3 * w1 + 2 * blocks * w1 * w1)
    convolutions += 9 * (w1 * w2 + (2 * blocks - 1) * w2 * w2)
    convolutions += 9 * (w2 * w3 + (2 * blocks - 1) * w3 * w3)
    norms = 2 * ((1 + 2 * blocks) * w1 + 2 * blocks * (w2 + w3))
    shortcuts = w1 * w2 + w2 * w3 + 2 * (w2 + w3) if shortcut == "conv" else 0
    classifier = 64 * classes + classes
    assert convolutions + norms + shortcuts + classifier == expected
    assert parameters(factory((3, 32, 32), shortcut=shortcut)) + classifier == expected


@pytest.mark.parametrize(("width", "depth"), [(256, 2), (10, 1), (7, 4)])
def test_mlp_parameters(width, depth):
    expected = (3 * 5 * 4) * width + width + (depth - 1) * (width * width + width)
    assert parameters(mlp((3, 5, 4), width=width, depth=depth)) == expected


@pytest.mark.parametrize("width", [1, 16, 32])
def test_small_cnn_parameters(width):
    convolutions = (9 * 3 * width + width) + (9 * width * 2 * width + 2 * width)
    flat = 2 * width * 2 * 3  # 9x13 halves to 4x6 and to 2x3
    expected = convolutions + flat * 4 * width + 4 * width
    assert parameters(small_cnn((3, 9, 13), width=width)) == expected


def test_pad_shortcut_is_every_second_pixel_and_zeros():
    block = resnet20((3, 8, 8), width=2, shortcut="pad").get_submodule("stages.4")
    x = torch.randn(2, 2, 7, 6)
    y = block.shortcut(x)
    assert torch.equal(y[:, :2], x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4]])
    assert y.shape[1] == 4
    assert (y[:, 2:] == 0).all()


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_weights_are_a_function_of_the_seed(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in BACKBONES.get(name)((1, 8, 8)).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ["mlp", "small_cnn"])
def test_he_weights_keep_the_size_of_the_signal(name):
    torch.manual_seed(0)
    y = torch.randn(64, 3, 16, 16)
    backbone = BACKBONES.get(name)((3, 16, 16), width=128)
    deviations = [1.0]
    for stage in backbone.stages:
        y = stage(y)
        deviations.append(y.square().mean().sqrt().item())
    assert all(0.6 < after / before < 2.0 for before, after in pairwise(deviations))
    assert all((p == 0).all() for name, p in backbone.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_cnn((1, 8, 8), width=0), "small_cnn.width: found 0; give 1 or more"),
        (lambda: small_cnn((1, 8, 8), depth=0), "small_cnn.depth: found 0; give 1 or more"),
        (lambda: small_cnn((1, 8, 8), depth=4), "small_cnn: found images of 8x8; use at least 16x16"),
        (lambda: small_cnn((1, 8, 3)), "small_cnn: found images of 8x3; use at least 4x4"),
        (lambda: small_cnn((784,)), r"small_cnn: found inputs of shape \(784,\)"),
        (lambda: mlp((1, 8, 8), width=-5), "mlp.width: found -5; give 1 or more"),
        (lambda: mlp((1, 8, 8), depth=0), "mlp.depth: found 0; give 1 or more"),
        (lambda: mlp((0, 8, 8)), "mlp: smallest side of the input: found 0"),
        (lambda: resnet20((3, 32, 32), width=0), "resnet20.width: found 0; give 1 or more"),
        (lambda: resnet32((3, 3, 32)), "resnet32: found images of 3x32; use at least 4x4"),
        (lambda: resnet32((0, 32, 32)), r"resnet32: found inputs of shape \(0, 32, 32\)"),
        (
            lambda: resnet32((3, 32, 32), shortcut="avg"),
            "resnet32.shortcut: found 'avg'; give 'conv' or 'pad'",
        ),
        (lambda: Backbone([], input_shape=(1, 2, 2)), "backbone: found no stages"),
        (
            lambda: Backbone([("a", nn.Flatten(), (4,)), ("a", nn.ReLU(), (4,))], input_shape=(1, 2, 2)),
            "backbone: found stage 'a' twice",
        ),
        (
            lambda: Backbone([("a", nn.ReLU(), (1, 2, 2))], input_shape=(1, 2, 2)),
            r"backbone: found last tap 'a' of shape \(1, 2, 2\); end in a flat vector",
        ),
    ],
)
def test_impossible_options_are_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown tap 'layer12'; did you mean 'layer1.2'\?"):
        resnet20((3, 32, 32)).tap("layer12")
    with pytest.raises(UnknownNameError, match=r"unknown backbone 'resnet23'; did you mean 'resnet"):
        BACKBONES.get("resnet23")
    assert resnet20((3, 32, 32)).tap("layer1.0") == 1


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_options_are_checked_against_the_signature(name):
    factory = BACKBONES.get(name)
    assert factory.__doc__
    assert check_options(factory, {"width": 8}, where=name) == {"width": 8}
    with pytest.raises(ConfigError, match=f"{name}.widht: unknown option; did you mean 'width'"):
        check_options(factory, {"widht": 8}, where=name)
    with pytest.raises(ConfigError, match=f"{name}.width: found '8'"):
        check_options(factory, {"width": "8"}, where=name)


def test_an_entry_point_names_a_backbone():
    point = EntryPoint("perceptron", "clframe.nn.backbones.plain:mlp", "clframe.backbones")
    assert list(load_backbone(point)) == [("perceptron", mlp)]
