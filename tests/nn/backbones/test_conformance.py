"""Conformance suite of backbones; registering a backbone enrolls it."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch

from clframe.config.files import known_configs
from clframe.config.load import load_config
from clframe.nn import BACKBONES
from clframe.nn.backbones.stages import tap_of
from clframe.options import check_options, missing_options

OPTIONS = {
    "bert": {"vocabulary": 50, "width": 16, "dropout": 0.0},
    "decoder": {"vocabulary": 50, "width": 16, "depth": 2, "heads": 2},
    "small_cnn": {"width": 4},
    "timm": {"model": "test_resnet"},
    "torchvision": {"model": "shufflenet_v2_x0_5"},
    "vgg11": {"width": 4, "hidden": 16, "dropout": 0.0},
    "vgg13": {"width": 4, "hidden": 16, "dropout": 0.0},
    "vgg16": {"width": 4, "hidden": 16, "dropout": 0.0},
    "vgg19": {"width": 4, "hidden": 16, "dropout": 0.0},
    "vit_tiny": {"width": 16, "depth": 2},
    "wide_resnet": {"depth": 10, "widen": 1},
}
"""Small ones, without dropout: it would make two runs differ."""
SHAPES = {"bert": ((7,), (12,)), "decoder": ((7,), (12,)), "vit_b_16": ((3, 224, 224), (1, 32, 32))}
IMAGES = ((3, 32, 32), (1, 64, 64))
TEXT = ("bert", "decoder")
FULL_SIZE = {
    "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "resnet34", "resnet50", "swin_t", "swin_v2_s", "vit_b_16"
}  # fmt: skip
"""20 to 90 million weights, or many layers, and no smaller version. Here they are built without numbers, on the meta
device; test_torchvision.py runs the same stages of small models."""
PRETRAINED_ONLY = {"hf_text", "hf_vit"}
"""test_transformers.py writes such models to a folder."""

DEEP = {"efficientnet_v2_s", "swin_v2_s"}
"""Those of many layers whose relatives are tried in the default suite."""

# Other tests register backbones too, if they are collected before.
SHIPPED = [name for name in BACKBONES.names() if BACKBONES.get(name).__module__.startswith("clframe.")]
NAMES = [name for name in SHIPPED if name not in PRETRAINED_ONLY]
QUICK = [name for name in NAMES if name not in FULL_SIZE]


def shapes(name):
    return SHAPES.get(name, IMAGES)


def build(name, shape, seed=0):
    torch.manual_seed(seed)
    return BACKBONES.get(name)(shape, **OPTIONS.get(name, {}))


@functools.cache
def built(name):
    """One for all the tests that do not change it."""
    return build(name, shapes(name)[0])


def samples(name, shape, count):
    return torch.randint(0, 50, (count, *shape)).float() if name in TEXT else torch.randn(count, *shape)


def run(backbone, x):
    """Every tap by name."""
    taps, value = {}, x
    for name, stage in zip(backbone.names, backbone.stages, strict=True):
        value = stage(value)
        taps[name] = tap_of(value)
    return taps


@pytest.mark.parametrize("name", QUICK)
def test_declared_taps_are_the_real_ones(name):
    backbone = built(name).eval()
    shape = shapes(name)[0]
    for batch in (1, 3):
        x = samples(name, shape, batch)
        with torch.no_grad():
            taps = run(backbone, x)
            whole = backbone(x)
        assert {tap: tuple(value.shape) for tap, value in taps.items()} == {
            tap: (batch, *declared) for tap, declared in backbone.tap_shapes.items()
        }
        assert torch.equal(whole, taps[backbone.names[-1]])
        assert whole.isfinite().all()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in DEEP)) for n in NAMES])
def test_every_input_size_declares_its_own_shapes(name):
    declared = []
    for shape in shapes(name):
        with torch.device("cpu" if name in ("timm", "torchvision") else "meta"):  # construction looks at numbers
            backbone = build(name, shape)
            x = torch.zeros(3, *shape)
        with torch.no_grad():
            taps = run(backbone.eval(), x)
        assert {tap: tuple(value.shape[1:]) for tap, value in taps.items()} == backbone.tap_shapes
        assert backbone.input_shape == shape
        declared.append(backbone.tap_shapes)
        stages = [{id(p) for p in stage.parameters()} for stage in backbone.stages]
        assert sum(map(len, stages)) == len(set().union(*stages))  # no weight is registered in two stages
    assert declared[0] != declared[1] or name == "mlp"


@pytest.mark.parametrize("name", QUICK)
def test_stages_leave_earlier_taps_alone_and_pass_gradients_back(name):
    backbone = build(name, shapes(name)[0]).train()
    x = samples(name, shapes(name)[0], 4)
    value, kept = x, [(x, x.clone())]
    for stage in backbone.stages:
        value = stage(value)
        kept.append((tap_of(value), tap_of(value).detach().clone()))
    assert all(torch.equal(tap, copy_of_it) for tap, copy_of_it in kept)
    value.square().sum().backward()
    first = [p.grad for p in backbone.stages[0].parameters()]
    assert first and all(g is not None and g.isfinite().all() for g in first)
    assert any(g.abs().sum() > 0 for g in first)


@pytest.mark.parametrize("name", QUICK)
def test_weights_are_a_function_of_the_seed(name):
    one, two, other = (build(name, shapes(name)[0], seed).state_dict() for seed in (5, 5, 6))
    assert list(one) == list(two) == list(other)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", QUICK)
def test_state_and_copies_compute_the_same(name):
    one, other = built(name).eval(), build(name, shapes(name)[0], seed=1).eval()
    x = samples(name, shapes(name)[0], 2)
    with torch.no_grad():
        expected = one(x)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(one.state_dict())
        assert torch.equal(other(x), expected)
        twin = copy.deepcopy(one)
        assert torch.equal(twin(x), expected)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(one(x), expected)
    assert (twin.names, twin.tap_shapes) == (one.names, one.tap_shapes)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_backbone_has_a_config_that_gives_all_it_needs(name):
    assert f"backbone/{name}" in known_configs()
    config = load_config("quickstart", [f"backbone={name}"]).backbone
    assert config.name == name
    assert not missing_options(BACKBONES.get(name), check_options(BACKBONES.get(name), config.options, where="backbone"))


@pytest.mark.slow
def test_listing_backbones_imports_none_of_their_libraries():
    code = (
        "import sys; from clframe.nn import BACKBONES; from clframe.options import option_types\n"
        "[option_types(entry) for _, entry in BACKBONES.items()]\n"
        "print(*sorted({'torchvision', 'timm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
