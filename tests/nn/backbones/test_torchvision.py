"""Stages of torchvision's models: with the model's own head behind them they are the model."""

from __future__ import annotations

import copy
from itertools import pairwise
from urllib.error import URLError

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from clframe.errors import ConfigError, DataError, UnknownNameError
from clframe.nn.backbones import Backbone, convnext_tiny, resnet18, resnet50, swin_t, vit_b_16, vit_tiny
from clframe.nn.backbones.torchvision_nets import convnext_stages, efficientnet_stages, resnet_stages, swin_stages
from clframe.nn.backbones.vit import vit_stages


def swin(**options):
    sizes = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "num_classes": 5}
    return SwinTransformer(patch_size=[4, 4], window_size=[3, 3], **sizes, **options)


MODELS = {
    "resnet": lambda: tv.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=5),
    "bottlenecks": lambda: tv.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=2, width_per_group=4),
    "efficientnet": lambda: tv.EfficientNet(
        [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 12, 2)], dropout=0.2, num_classes=5
    ),
    "efficientnet_v2": lambda: tv.EfficientNet(
        [FusedMBConvConfig(1, 3, 1, 8, 8, 2), FusedMBConvConfig(4, 3, 2, 8, 12, 1)], dropout=0.2, num_classes=5
    ),
    "convnext": lambda: tv.ConvNeXt(
        [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)], layer_scale=0.5, num_classes=5
    ),
    "swin": swin,
    "swin_v2": lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "vit": lambda: tv.VisionTransformer(40, 8, 3, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=5),
}
STAGES = {
    "resnet": resnet_stages, "bottlenecks": resnet_stages,
    "efficientnet": efficientnet_stages, "efficientnet_v2": efficientnet_stages,
    "convnext": convnext_stages, "swin": swin_stages, "swin_v2": swin_stages, "vit": vit_stages,
}  # fmt: skip
HEADS = {
    "resnet": "fc", "bottlenecks": "fc", "efficientnet": "classifier.1", "efficientnet_v2": "classifier.1",
    "convnext": "classifier.2", "swin": "head", "swin_v2": "head", "vit": "heads.head",
}  # fmt: skip
NAMES = {
    "resnet": "stem layer1.0 layer2.0 layer2.1 layer3.0 layer4.0 pool",
    "bottlenecks": "stem layer1.0 layer2.0 layer3.0 layer4.0 pool",
    "efficientnet": "stem stage1.0 stage2.0 stage2.1 pool",
    "efficientnet_v2": "stem stage1.0 stage1.1 stage2.0 pool",
    "convnext": "stem stage1.0 stage2.0 stage2.1 stage3.0 pool",
    "swin": "stem stage1.0 stage2.0 stage2.1 stage3.0 stage4.0 pool",
    "swin_v2": "stem stage1.0 stage2.0 stage2.1 stage3.0 stage4.0 pool",
    "vit": "embed encoder.0 encoder.1 encoder.2 cls",
}
SIDE = 40
"""Not a multiple of the models' strides, so that rounding and padding take part."""


def made(family):
    """A model whose every number differs from its initialization: heads, statistics and all."""
    torch.manual_seed(3)
    model = MODELS[family]()
    with torch.no_grad():
        for part in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            part.add_(torch.rand_like(part) * 0.1)
    return model.eval()


@pytest.mark.parametrize("family", MODELS)
def test_stages_and_the_model_s_own_head_are_the_model(family):
    model = made(family)
    backbone = Backbone.of(STAGES[family](model), input_shape=(3, SIDE, SIDE))
    assert " ".join(backbone.names) == NAMES[family]  # none writes into the tap before it, so none was joined
    head = model.get_submodule(HEADS[family])
    for x in (torch.randn(1, 3, SIDE, SIDE), torch.randn(3, 3, SIDE, SIDE)):
        torch.testing.assert_close(head(backbone(x)), model(x), rtol=0, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(head(backbone(x)), model(x), rtol=0, atol=1e-6)
    # Nothing but the head is left out.
    left_out = sum(p.numel() for p in head.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in model.parameters()) - left_out


@pytest.mark.parametrize("family", MODELS)
def test_stages_train_as_the_model_does(family):
    model = made(family)
    head = model.get_submodule(HEADS[family])
    x = torch.randn(4, 3, SIDE, SIDE)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # the classifier's dropout is the classifier's
    twin = copy.deepcopy(model)
    model.train(), torch.manual_seed(1)  # the same stochastic depth in both
    model(x).square().mean().backward()
    backbone = Backbone.of(STAGES[family](twin), input_shape=(3, SIDE, SIDE)).train()
    twin.train(), torch.manual_seed(1)
    head = twin.get_submodule(HEADS[family])
    head(backbone(x)).square().mean().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad), name
    for (name, p), (_, q) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("family", ["swin", "swin_v2"])
def test_taps_of_swin_are_channels_first(family):
    model = made(family)
    backbone = Backbone.of(STAGES[family](model), input_shape=(3, 40, 56))
    assert backbone.tap_shapes["stem"] == (16, 10, 14)
    assert backbone.tap_shapes["stage2.1"] == (32, 5, 7)
    assert backbone.tap_shapes["stage3.0"] == (64, 3, 4)
    x = torch.randn(2, 3, 40, 56)
    assert torch.equal(backbone.stages[0](x), model.features[0](x).permute(0, 3, 1, 2))


def test_taps_of_resnet18_at_224_pixels():
    with torch.device("meta"):
        taps = resnet18((3, 224, 224)).tap_shapes
    assert taps == {
        "stem": (64, 56, 56), "layer1.0": (64, 56, 56), "layer1.1": (64, 56, 56),
        "layer2.0": (128, 28, 28), "layer2.1": (128, 28, 28), "layer3.0": (256, 14, 14), "layer3.1": (256, 14, 14),
        "layer4.0": (512, 7, 7), "layer4.1": (512, 7, 7), "pool": (512,),
    }  # fmt: skip


def test_taps_of_vit_b_16_are_the_paper_s_layers():
    with torch.device("meta"):
        backbone = vit_b_16((3, 224, 224))
    assert backbone.names == ("embed", *(f"encoder.{layer}" for layer in range(12)), "cls")
    assert backbone.tap_shapes["encoder.10"] == (14 * 14 + 1, 768)
    assert sum(p.numel() for p in backbone.parameters()) == 86_567_656 - 769_000  # torchvision's count, less its head


def test_the_same_seed_draws_torchvision_s_own_weights():
    torch.manual_seed(11)
    ours = resnet18((3, 32, 32))
    torch.manual_seed(11)
    theirs = tv.resnet18()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=False)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_small_stem_keeps_the_image(channels):
    taps = resnet18((channels, 32, 30), stem="cifar").tap_shapes
    assert (taps["stem"], taps["layer1.1"], taps["layer4.1"]) == ((64, 32, 30), (64, 32, 30), (512, 4, 4))
    assert sum(p.numel() for p in resnet18((channels, 32, 32), stem="cifar").stages[0].parameters()) == (
        9 * channels * 64 + 2 * 64
    )


@pytest.mark.parametrize(
    ("factory", "first", "deviation"),
    [(resnet18, "stages.0.0", (2 / (64 * 49)) ** 0.5), (convnext_tiny, "stages.0.0", 0.02),
     (swin_t, "stages.0.body.0", (1 / 3 / 16) ** 0.5), (vit_b_16, "stages.0.patches", (1 / 256) ** 0.5)],
)  # fmt: skip
def test_other_channels_get_a_first_layer_drawn_as_the_model_s(factory, first, deviation):
    layer = factory((1, 32, 32)).get_submodule(first)
    assert layer.weight.shape[1] == 1
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert layer.bias is None or (layer.bias == 0).all()


def test_small_vision_transformer_by_arithmetic():
    patch, width, depth, classes = 7, 12, 2, 16
    backbone = vit_tiny((2, 28, 28), patch=patch, width=width, depth=depth, heads=3)
    attention = 4 * width * width + 4 * width
    hidden = 2 * 4 * width * width + 5 * width
    layer = attention + hidden + 2 * 2 * width
    embed = 2 * patch * patch * width + width + width + (classes + 1) * width
    assert sum(p.numel() for p in backbone.parameters()) == embed + depth * layer + 2 * width
    assert set(backbone.tap_shapes.values()) == {(classes + 1, width), (width,)}


def test_the_last_tap_is_the_normalized_class_token():
    backbone = vit_tiny((1, 8, 8), width=8, depth=1).eval()
    tokens = torch.randn(3, 5, 8)
    norm = backbone.stages[-1].norm
    mean, var = tokens[:, 0].mean(-1, keepdim=True), tokens[:, 0].var(-1, keepdim=True, unbiased=False)
    expected = (tokens[:, 0] - mean) / (var + norm.eps).sqrt()
    torch.testing.assert_close(backbone.stages[-1](tokens), expected)


class Published:
    """Replaces the server of torchvision."""

    def __init__(self, monkeypatch, state):
        self.asked: list[dict] = []

        def load(url, **options):
            self.asked.append({"url": url, **options})
            if isinstance(state, Exception):
                raise state
            return state

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)


def test_published_weights_are_loaded_as_tensors_with_their_hash(monkeypatch):
    state = tv.resnet18().state_dict()
    published = Published(monkeypatch, state)
    backbone = resnet18((3, 32, 32), weights="IMAGENET1K_V1")
    (asked,) = published.asked
    assert asked["url"].endswith("/resnet18-f37072fd.pth")
    assert asked["check_hash"] is True and asked["weights_only"] is True and asked["progress"] is True
    assert torch.equal(backbone.stages[0][0].weight, state["conv1.weight"])
    assert torch.equal(backbone.stages[8].bn2.running_var, state["layer4.1.bn2.running_var"])


def test_positions_are_interpolated_to_another_size(monkeypatch):
    small = {"num_heads": 2, "hidden_dim": 8, "mlp_dim": 32, "num_layers": 1, "patch_size": 16}
    state = tv.VisionTransformer(224, **small).state_dict()
    grid = torch.arange(14.0)[:, None].expand(14, 14).reshape(1, 196, 1).expand(1, 196, 8)
    state["encoder.pos_embedding"] = torch.cat([torch.full((1, 1, 8), -7.0), grid], dim=1)
    monkeypatch.setattr("clframe.nn.backbones.vit._vision_transformer",
                        lambda shape, **_: tv.VisionTransformer(shape[1], **small))  # fmt: skip
    Published(monkeypatch, dict(state))
    same = vit_b_16((3, 224, 224), weights="IMAGENET1K_V1").stages[0].positions
    assert torch.equal(same, state["encoder.pos_embedding"])
    Published(monkeypatch, dict(state))
    smaller = vit_b_16((3, 32, 32), weights="IMAGENET1K_V1").stages[0].positions
    assert smaller.shape == (1, 5, 8)
    torch.testing.assert_close(smaller[0, :, 0], torch.tensor([-7.0, 0.0, 0.0, 13.0, 13.0]))  # corners stay corners


@pytest.mark.parametrize("reason", [URLError("no route to host"), RuntimeError("invalid hash value (expected ...)")])
def test_no_connection_is_one_line(monkeypatch, reason):
    Published(monkeypatch, reason)
    with pytest.raises(DataError, match=r"^resnet50.weights: https://\S+ could not be loaded \(.+\); connect") as caught:
        resnet50((3, 32, 32), weights="IMAGENET1K_V2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: resnet18((3, 32, 32), weights="IMAGENET1K_V7"), UnknownNameError,
         "resnet18.weights: unknown weights 'IMAGENET1K_V7'; did you mean 'IMAGENET1K_V1'"),
        (lambda: resnet18((1, 32, 32), weights="IMAGENET1K_V1"), ConfigError,
         "resnet18.weights: found images of 1 channels; use 3, or leave weights out"),
        (lambda: resnet18((3, 32, 32), weights="IMAGENET1K_V1", stem="cifar"), ConfigError,
         "resnet18.stem: found 'cifar' with weights IMAGENET1K_V1; give 'imagenet'"),
        (lambda: resnet18((3, 32, 32), stem="mnist"), ConfigError, "resnet18.stem: found 'mnist'; give"),
        (lambda: resnet18((3, 7, 32)), ConfigError, "resnet18: found images of 7x32; use at least 8x8"),
        (lambda: convnext_tiny((3, 28, 28)), ConfigError, "convnext_tiny: found images of 28x28; use at least 32x32"),
        (lambda: vit_b_16((3, 32, 48)), ConfigError, "vit_b_16: found images of 32x48; use squares with a side that 16"),
        (lambda: vit_b_16((3, 16, 16), dropout=1.0), ConfigError, "vit_b_16.dropout: found 1.0; give 0 or more"),
        (lambda: vit_tiny((1, 30, 30)), ConfigError, "vit_tiny: found images of 30x30; use squares with a side that 4"),
        (lambda: vit_tiny((1, 28, 28), heads=5), ConfigError, "vit_tiny.heads: found 5 with width 64; give a number"),
        (lambda: vit_tiny((1, 28, 28), depth=0), ConfigError, "vit_tiny.depth: found 0; give 1 or more"),
    ],
)  # fmt: skip
def test_impossible_options_are_one_line(make, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_blocks_halve_the_image_stage_by_stage():
    with torch.device("meta"):
        taps = convnext_tiny((3, 96, 96)).tap_shapes
    sides = [taps[f"stage{stage}.0"][1] for stage in (1, 2, 3, 4)]
    assert sides[0] == 24 and all(a == 2 * b for a, b in pairwise(sides))
    assert [taps[f"stage{stage}.0"][0] for stage in (1, 2, 3, 4)] == [96, 192, 384, 768]
    assert len(taps) == 3 + 3 + 9 + 3 + 2
