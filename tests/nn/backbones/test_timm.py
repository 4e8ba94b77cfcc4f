"""timm's models cut into stages: the same function as the whole model, or a refusal."""

from __future__ import annotations

import sys

import pytest
import timm as library
import torch

from clframe.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from clframe.nn.backbones import timm

CUT = {
    "test_resnet": ((3, 40, 40), "act1 layer1 layer2 layer3 layer4 head"),
    "test_efficientnet": ((1, 32, 40), "blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 head"),
    "test_convnext": ((3, 64, 32), "stages.0 stages.1 stages.2 stages.3 head"),
    "test_vit": ((3, 160, 160), "embed blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 head"),
}


@pytest.mark.parametrize("model", CUT)
def test_stages_are_the_model(model):
    shape, names = CUT[model]
    torch.manual_seed(4)
    backbone = timm(shape, model=model).eval()
    options = {"img_size": shape[1:]} if model == "test_vit" else {}
    torch.manual_seed(4)
    whole = library.create_model(model, num_classes=0, in_chans=shape[0], **options).eval()
    assert " ".join(backbone.names) == names
    x = torch.randn(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), whole(x), rtol=0, atol=1e-6)
        found = [tuple(tap.shape[1:]) for tap in whole.forward_intermediates(x, intermediates_only=True)]
    assert backbone.features == whole.num_features or backbone.features == whole.head_hidden_size
    declared = [backbone.tap_shapes[name] for name in backbone.names if name not in ("embed", "head")]
    if model == "test_vit":  # timm gives its tokens without the class token, as maps
        assert {(h * w + whole.num_prefix_tokens, c) for c, h, w in found} == set(declared)
    else:
        assert declared == found


def test_channels_last_maps_are_turned():
    with_maps = timm((3, 64, 64), model="swin_tiny_patch4_window7_224")
    assert with_maps.tap_shapes["layers.0"] == (96, 16, 16)
    assert with_maps.tap_shapes["layers.3"] == (768, 2, 2)


@pytest.mark.slow
def test_a_model_whose_forward_is_no_sequence_is_traced():
    torch.manual_seed(6)
    backbone = timm((3, 64, 64), model="hrnet_w18_small").eval()
    torch.manual_seed(6)
    whole = library.create_model("hrnet_w18_small", num_classes=0).eval()
    assert backbone.names == ("layer1.0", "global_pool", "output")  # between them it has several branches
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(x), whole(x))


def test_layers_inside_of_stages_are_taps_by_name():
    torch.manual_seed(6)
    backbone = timm((3, 40, 33), model="test_resnet", taps=("layer2.0",)).eval()
    torch.manual_seed(6)
    whole = library.create_model("test_resnet", num_classes=0).eval()
    assert backbone.names == ("act1", "layer1", "layer2.0", "layer2", "layer3", "layer4", "output")
    x = torch.randn(2, 3, 40, 33)
    with torch.no_grad():
        assert torch.equal(backbone(x), whole(x))
    maps = timm((3, 64, 64), model="swin_tiny_patch4_window7_224", taps=("layers.1.blocks.0",))
    assert maps.tap_shapes["layers.1.blocks.0"] == (192, 8, 8)  # (height, width, channels) in timm


def test_an_unknown_model_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^timm.model: unknown model 'resnt18'; did you mean 'resnet18'\?$"):
        timm((3, 32, 32), model="resnt18")


def test_an_image_that_the_model_does_not_take_is_named():
    with pytest.raises(ConfigError, match=r"^timm: .*test_vit"):
        timm((3, 33, 31), model="test_vit")


def test_weights_that_cannot_be_loaded_are_one_line(monkeypatch):
    def offline(name, **options):
        assert options == {"pretrained": True, "in_chans": 3, "num_classes": 0}
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(library, "create_model", offline)
    with pytest.raises(DataError, match=r"^timm: test_resnet could not be loaded \(no route to host\); connect, or set"):
        timm((3, 32, 32), model="test_resnet", pretrained=True)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnsupportedError, match=r"^timm: found no package timm; pip install clframe\[timm\]$"):
        timm((3, 32, 32), model="test_resnet")
