"""Models divided after named layers through torch.fx: the same function, to the bit, or a refusal in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.accounting.macs import stage_macs
from clframe.errors import ConfigError, UnknownNameError
from clframe.exits import ExitPolicy
from clframe.exits.dynamic import DynamicNetwork
from clframe.nn import Backbone, GrowingLinear, Network
from clframe.nn.backbones import BACKBONES
from clframe.nn.backbones.traced import drop_classifier


def _traces_factories() -> bool:
    try:
        torch.fx.symbolic_trace(lambda x: torch.arange(1.0, device=x.device))
    except TypeError:
        return False
    return True


FACTORIES = pytest.mark.skipif(not _traces_factories(), reason="torch.fx of torch 2.6 does not trace torch.arange")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        if self.training:  # a branch on the mode, inside of a layer
            x = x + 0.25
        return F.relu(x + self.drop(self.norm(self.conv(x))))


class Branches(nn.Module):
    """Two branches, a size read early and used late, a dropout as a function, an auxiliary output, a parameter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, stride=2)
        self.left, self.right = Block(6), nn.Conv2d(6, 6, 1)
        self.body = nn.Sequential(Block(6), Block(6))
        self.unused, self.act = nn.Linear(3, 3), nn.ReLU()
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))

    def forward(self, x, scaled=True):
        count, device = x.shape[0], x.device
        x = self.act(self.stem(x))
        x = torch.cat([self.left(x), self.right(x)]).view(2, count, 6, -1, x.shape[3]).sum(0)
        x = self.body(x) * self.scale
        x = F.dropout(x, 0.4, training=self.training) if scaled else x
        return self.act(x.view(count, -1)) + torch.arange(1.0, device=device)


class Masked(nn.Module):
    """Ids to features; a mask passes all blocks by."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(9, 4), nn.Parameter(torch.randn(5, 4))
        self.first = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.second = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, ids):
        ids = ids.long()
        padding = ids == 0
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.first(self.embed(ids) + self.positions[places], src_key_padding_mask=padding)
        x = self.second(x + self.positions[places], src_key_padding_mask=padding)
        return x.masked_fill(padding.unsqueeze(-1), 0).sum(1)


def run_both(model, backbone, x, *, train):
    """Output, gradients and buffers of the model, and of the backbone, with the same random numbers."""
    found = []
    for module in (model, backbone):
        module.train(train)
        torch.manual_seed(5)
        value = module(x)
        module.zero_grad()
        value.square().sum().backward()
        found.append((value, {name_of(n): p.grad for n, p in module.named_parameters() if p.grad is not None}))
    return found


def name_of(name):
    """Name in the model of a tensor of the backbone."""
    return name.split(".", 2)[2].removeprefix("in_evaluation.").removeprefix("in_training.") if "stages." in name else name


def assert_equal(model, backbone, shape, *, ids=False):
    reference = copy.deepcopy(model)
    for train in (False, True, False):
        for batch in (1, 4) if not train else (3,):
            x = torch.randint(0, 9, (batch, *shape)) if ids else torch.randn(batch, *shape)
            (whole, gradients), (staged, others) = run_both(reference, backbone, x, train=train)
            assert torch.equal(staged, whole.flatten(1))
            assert gradients.keys() == others.keys()
            assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    buffers = {name_of(name): value for name, value in backbone.named_buffers()}
    assert all(torch.equal(buffers[name], value) for name, value in reference.named_buffers())


@FACTORIES
def test_a_model_with_branches_is_divided_bit_for_bit():
    torch.manual_seed(1)
    model = Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = Backbone.of(model, input_shape=(2, 13, 9), taps=["body.1", "stem", "body.0"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert backbone.tap_shapes == {"stem": (6, 6, 4), "body.0": (6, 6, 4), "body.1": (6, 6, 4), "output": (144,)}
    assert all(part.training for part in model.modules())  # as before
    assert_equal(model, backbone, (2, 13, 9))
    assert_equal(model, copy.deepcopy(backbone), (2, 13, 9))


@FACTORIES
def test_without_names_it_is_divided_after_its_blocks():
    model = Branches()
    # The branches are no taps, and neither is what is not called.
    assert Backbone.of(model, input_shape=(2, 13, 9), depth=2).names == ("body.0", "body.1", "output")
    assert Backbone.of(model, input_shape=(2, 13, 9)).names == ("body", "output")


@FACTORIES
def test_a_mask_is_carried_and_leaves_with_its_samples():
    torch.manual_seed(2)
    model = Masked().double()
    backbone = Backbone.of(model, input_shape=(5,), taps=["first"])
    assert backbone.tap_shapes == {"first": (5, 4), "output": (4,)}
    ids = torch.randint(0, 9, (6, 5))
    ids[:, 0] = 3
    tap, padding = backbone.eval().stages[0](ids)
    assert torch.equal(padding, ids == 0) and tap.shape == (6, 5, 4)
    assert torch.equal(backbone(ids), model.eval()(ids))

    keep = torch.tensor([4, 1])
    torch.testing.assert_close(backbone.stages[1]((tap[keep], padding[keep])), model(ids)[keep], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 37, 45), (3, 32, 32)])
@pytest.mark.parametrize(
    ("name", "taps", "features"),
    [
        ("resnet18", ("layer2.1", "layer3.0"), 512),
        ("densenet121", ("features.denseblock2",), 1024),
        ("mobilenet_v2", ("features.7", "features.14"), 1280),
    ],
)
@pytest.mark.slow
def test_torchvision_models_as_they_come(name, taps, features, shape):
    from torchvision.models import get_model

    torch.manual_seed(3)
    backbone = BACKBONES.get("torchvision")(shape, model=name, taps=taps)
    torch.manual_seed(3)
    model = get_model(name)
    drop_classifier(model)
    assert set(taps) <= set(backbone.names) and backbone.features == features
    assert_equal(model, backbone, shape)


@FACTORIES
def test_exits_stop_early_and_cost_what_their_stages_cost():
    torch.manual_seed(4)
    network = Network(
        Backbone.of(Branches(), input_shape=(2, 13, 9), taps=["stem", "body.0"]),
        exits=[("stem", FlatHead(6 * 6 * 4)), ("body.0", FlatHead(6 * 6 * 4))],
    ).eval()
    network.grow(range(3))
    conv, block = 6 * 4 * 6 * 2 * 9, 6 * 4 * 6 * 6 * 9
    costs = stage_macs(network)
    assert costs["stem"] == conv
    assert costs["body.0"] == 2 * block + 6 * 4 * 6 * 6 and costs["output"] == block
    x = torch.randn(9, 2, 13, 9)
    every = network(x)
    threshold = every.logits[0].softmax(1).amax(1).median().item()
    scores_BC, exit_B = DynamicNetwork(network, ExitPolicy(thresholds=threshold), compact=0.0)(x)
    assert 0 < int((exit_B == 0).sum()) < 9
    for sample, exit in enumerate(exit_B.tolist()):  # the batch of later stages is smaller than the size read early
        torch.testing.assert_close(scores_BC[sample], every.logits[exit][sample], rtol=0, atol=1e-6)


class FlatHead(GrowingLinear):
    def forward(self, x):
        return super().forward(x.flatten(1))


@FACTORIES
@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["bdy.0"], r"^backbone: Branches has no layer 'bdy.0'; did you mean 'body.0'\?$"),
        (["left"], r"^backbone: layer 'left' is not on every path from the inputs to the features \('act' passes it by"),
        (["body.0.conv"], r"^backbone: layer 'body.0.conv' .* \('.*' passes it by\); use 'body.0'$"),
        (["act"], r"^backbone: layer 'act' is called 2 times by the forward; name a layer that all paths pass through$"),
        (["unused"], r"^backbone: layer 'unused' is not called by the forward; name"),
    ],
)
def test_what_cannot_be_a_tap_is_one_line(taps, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        Backbone.of(Branches(), input_shape=(2, 13, 9), taps=taps)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x) + 1


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(3, 4), nn.Dropout(0.5, inplace=True), nn.Linear(4, 5)

    def forward(self, x):
        return self.b(self.drop(self.a(x))) + 1


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def test_a_forward_that_a_trace_would_change_is_refused():
    with pytest.raises(ConfigError, match=r"^backbone: the traced forward of Frozen differs from the model; give \(name"):
        Backbone.of(Frozen(), input_shape=(3,), taps=["a"])
    with pytest.raises(ConfigError, match=r"^backbone: layer 'a' is overwritten in place by the layer that follows"):
        Backbone.of(InPlace(), input_shape=(3,), taps=["a"])
    with pytest.raises(ConfigError, match=r"^backbone: torch.fx cannot trace the forward of Chooses \(symbolically trac"):
        Backbone.of(Chooses(), input_shape=(3,), taps=["a"])
    with pytest.raises(ConfigError, match="^backbone: found taps for stages in pairs; give the module"):
        Backbone.of([("a", nn.Linear(3, 4))], input_shape=(3,), taps=["a"])


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("class", nn.Linear(4, 6))

    def forward(self, x):
        return getattr(self, "class")(x).relu()


def test_a_layer_named_by_a_word_of_python_is_refused_by_name():
    with pytest.raises(ConfigError, match="Keyword has a layer named 'class', a word of Python's grammar"):
        Backbone.of(Keyword(), input_shape=(4,))
