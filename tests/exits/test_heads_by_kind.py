"""Every kind against its formula, its parameter count by arithmetic, and inside a network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.accounting.macs import count_parameters, stage_macs
from clframe.errors import ConfigError, UnknownNameError
from clframe.exits.head_kinds import make_head, make_matched_head
from clframe.nn import Network, restore
from clframe.nn.backbones import Backbone, mlp, resnet32, small_cnn
from clframe.nn.types import Output

KINDS = [
    ("pool", (6, 7, 5)), ("pool", (6, 1, 1)), ("pool", (2, 1, 9)), ("conv", (6, 7, 5)), ("conv", (1, 9, 9)),
    ("conv_large", (6, 14, 15)), ("conv_large", (1, 3, 2)), ("token", (5, 8)), ("token", (1, 3)), ("hidden", (9,)),
    ("hidden", (5, 8)), ("hidden", (2, 3, 3)), ("linear", (9,)), ("auto", (6, 7, 5)), ("auto", (5, 8)), ("auto", (9,)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_experience", [False, True])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_every_kind_trains_on_odd_shapes_and_single_samples(kind, shape, per_experience, dtype):
    torch.manual_seed(0)
    head = make_head(kind, shape, per_experience=per_experience, cascade=True, cascade_norm=True).to(dtype)
    head.grow([0])
    x = torch.randn(1, *shape, dtype=dtype)
    assert head(x).shape == (1, 1)
    head.grow([1, 2])
    x = torch.randn(6, *shape, dtype=dtype, requires_grad=True)
    kept = x.detach().clone()
    logits_BC = head(x, torch.randn(6, 3, dtype=dtype))
    F.cross_entropy(logits_BC, torch.tensor([0, 1, 2] * 2)).backward()
    assert logits_BC.dtype == dtype
    assert torch.equal(x, kept), "a head must not write into the tap"
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def linear(head, features_BF):
    return features_BF @ head.classifier.weight.T + head.classifier.bias


def test_pool_is_the_formula():
    head = make_head("pool", (3, 6, 4))
    head.grow([0, 1])
    x = torch.randn(2, 3, 6, 4)
    a = head.layers[1].a
    windows = x.unfold(2, 2, 2).unfold(3, 2, 2)
    pooled = a * windows.amax((4, 5)) + (1 - a) * windows.mean((4, 5))
    assert head.features == 3 * 3 * 2
    torch.testing.assert_close(head(x), linear(head, pooled.flatten(1)))


def test_conv_is_the_formula():
    head = make_head("conv", (3, 8, 8))
    head.grow([0, 1])
    x = torch.randn(2, 3, 8, 8)
    conv, pool = head.layers[0], head.layers[2]
    y = F.conv2d(x, conv.weight, conv.bias, padding=1).clamp(min=0)
    windows = y.unfold(2, 2, 2).unfold(3, 2, 2)
    pooled = pool.a * windows.amax((4, 5)) + (1 - pool.a) * windows.mean((4, 5))
    assert count_parameters(head) == 3 * 3 * 9 + 3 + 1 + 2 * (3 * 16 + 1)
    torch.testing.assert_close(head(x), linear(head, pooled.flatten(1)))


def test_conv_large_is_the_formula():
    head = make_head("conv_large", (5, 14, 14))
    head.grow([0, 1])
    x = torch.randn(2, 5, 14, 14)
    conv, pool = head.layers[1], head.layers[2]
    y = F.conv2d(x.clamp(min=0), conv.weight, conv.bias, stride=2, padding=1)  # 2 channels of 7x7
    pooled = pool.a * F.adaptive_max_pool2d(y, 4) + (1 - pool.a) * F.adaptive_avg_pool2d(y, 4)
    assert count_parameters(head) == 2 * 5 * 9 + 2 + 1 + 2 * (2 * 16 + 1)
    torch.testing.assert_close(head(x), linear(head, pooled.flatten(1)))


@pytest.mark.parametrize("token", ["first", "mean"])
@pytest.mark.parametrize("norm", [False, True])
def test_token_is_the_formula(token, norm):
    head = make_head("token" if norm else "token_raw", (5, 8), token=token)
    head.grow([0, 1, 2])
    x = torch.randn(4, 5, 8)
    features = x[:, 0] if token == "first" else sum(x[:, t] for t in range(5)) / 5
    if norm:
        centered = features - features.mean(1, keepdim=True)
        features = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert count_parameters(head) == 16 * norm + 3 * 9
    torch.testing.assert_close(head(x), linear(head, features))


def test_hidden_and_linear_are_the_formula():
    x = torch.randn(4, 2, 3)
    head = make_head("hidden", (2, 3), hidden=10)
    head.grow([0, 1])
    layer = head.layers[1]
    torch.testing.assert_close(head(x), linear(head, (x.flatten(1) @ layer.weight.T + layer.bias).clamp(min=0)))
    assert count_parameters(head) == 10 * 7 + 2 * 11
    plain = make_head("linear", (6,))
    plain.grow([0, 1])
    torch.testing.assert_close(plain(x.flatten(1)), linear(plain, x.flatten(1)))


def test_auto_goes_by_the_dimensions_and_a_single_pixel_has_no_scalar():
    assert next(name for name, _ in make_head("auto", (4, 6, 6)).named_parameters()) == "layers.1.a"
    assert [type(layer) for layer in make_head("auto", (4, 1, 1)).layers] == [nn.Flatten]
    assert [type(layer) for layer in make_head("auto", (3, 4)).layers][1:] == [nn.LayerNorm]
    assert make_head("auto", (12,)).features == 12


def test_making_a_head_draws_what_it_keeps_and_nothing_for_the_dry_run():
    torch.manual_seed(0)
    expected = nn.Conv2d(3, 3, 3, padding=1)
    torch.manual_seed(0)
    assert torch.equal(make_head("conv", (3, 8, 8)).layers[0].weight, expected.weight)
    state = torch.get_rng_state()
    make_head("conv", (3, 512, 512), per_experience=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_heads_are_one_line():
    for kind, shape, message in [
        ("pool", (64,), "exits.head: found 'pool' for a tap of shape (64,); use linear, hidden or auto"),
        ("linear", (4, 2, 2), "exits.head: found 'linear' for a tap of shape (4, 2, 2); use pool, conv, conv_large, hidden or auto"),
        ("conv", (5, 8), "exits.head: found 'conv' for a tap of shape (5, 8); use token, token_raw, hidden or auto"),
        ("token_raw", (64,), "exits.head: found 'token_raw' for a tap of shape (64,); use linear, hidden or auto"),
        ("auto", (1, 2, 3, 4), "exits.head: found a tap of shape (1, 2, 3, 4); use one of 1 (flat), 2 (tokens) or 3 (a map) dimensions"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as error:
            make_head(kind, shape)
        assert str(error.value) == message
    with pytest.raises(UnknownNameError, match=r"^exits: unknown head 'pol'; did you mean 'pool'\?"):
        make_head("pol", (4, 2, 2))
    with pytest.raises(ConfigError, match=r"^exits\.cascade_norm: found true without a cascade; "):
        make_head("auto", (4,), cascade_norm=True)
    with pytest.raises(ConfigError, match=r"^exits\.hidden: found 0; give 1 or more$"):
        make_head("hidden", (4,), hidden=0)
    with pytest.raises(ConfigError, match=r"^exits\.token: found 'last'; give 'first' or 'mean'$"):
        make_head("token", (4, 2), token="last")
    with pytest.raises(ConfigError, match=r"^exits\.matched: found 0; give 1 or more$"):
        make_matched_head((4,), features=0)


TAPS = ("layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2")
EXPERIENCES = [range(first, first + 10) for first in range(0, 100, 10)]


def with_exits(*, per_experience: bool, matched: bool = False) -> Network:
    backbone = resnet32((3, 32, 32))
    heads = [make_head("pool", backbone.tap_shapes[tap], per_experience=per_experience) for tap in TAPS]
    if matched:
        shape = backbone.tap_shapes["pool"]
        heads = [make_matched_head(shape, features=head.features, per_experience=per_experience) for head in heads]
    network = Network(backbone, exits=[("pool" if matched else tap, h) for tap, h in zip(TAPS, heads, strict=True)])
    for classes in EXPERIENCES:
        network.grow(classes)
    return network


def test_resnet32_with_six_auxiliary_classifiers_has_the_published_parameters():
    features = [16 * 16 * 16] * 2 + [32 * 8 * 8] * 2 + [64 * 4 * 4] * 2
    linear = sum(100 * (width + 1) for width in features)
    plain = Network(resnet32((3, 32, 32)))
    plain.grow(range(100))
    assert count_parameters(plain) == 472_756
    network = with_exits(per_experience=True)
    assert [head.features for head in network.heads[:-1]] == features
    assert count_parameters(network) == 472_756 + linear + 60 == 1_907_016
    growing = with_exits(per_experience=False)
    assert count_parameters(growing) == 1_907_016 - 54
    matched = with_exits(per_experience=True, matched=True)
    assert count_parameters(matched) == 472_756 + linear == 1_906_956
    macs = stage_macs(network)
    assert [macs[f"exit/{tap}"] for tap in TAPS] == [100 * width for width in features]
    assert macs == stage_macs(growing)


@pytest.mark.parametrize("per_experience", [False, True])
def test_a_matched_head_is_repeated_or_averaged_features_and_a_linear_layer(per_experience):
    x = torch.randn(3, 6)
    for features, expected in [(12, x.repeat_interleave(2, 1)), (3, x.unflatten(1, (3, 2)).mean(2)), (6, x)]:
        head = make_matched_head((6,), features=features, per_experience=per_experience)
        head.grow([0, 1])
        inner = head.heads[0] if per_experience else head
        torch.testing.assert_close(head(x), linear(inner, expected))
        assert count_parameters(head) == 2 * (features + 1)
        assert head.features == features


class Tokens(nn.Module):
    """A map as a row of tokens, one for each pixel."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def mixed(per_experience: bool) -> Network:
    """A network with a tap of every dimension, and every kind of head on each."""
    torch.manual_seed(0)
    stages = [
        ("map", nn.Conv2d(3, 4, 3), (4, 7, 5)),
        ("tokens", Tokens(), (35, 4)),
        ("flat", nn.Sequential(nn.Flatten(), nn.Linear(140, 6)), (6,)),
    ]
    backbone = Backbone(stages, input_shape=(3, 9, 7))
    kinds = {"map": ["pool", "conv", "conv_large", "hidden"], "tokens": ["token", "hidden"], "flat": ["linear", "hidden"]}
    exits = []
    for tap, names in kinds.items():
        for kind in names:
            cascade = bool(exits)
            head = make_head(
                kind, backbone.tap_shapes[tap], per_experience=per_experience, cascade=cascade, cascade_norm=cascade
            )
            exits.append((tap, head))
    return Network(backbone, exits=exits)


@pytest.mark.parametrize("per_experience", [False, True])
def test_a_network_with_all_kinds_grows_trains_and_comes_back(per_experience):
    network = mixed(per_experience)
    x = torch.randn(6, 3, 9, 7)
    network.grow([0, 4])
    saved, before = copy.deepcopy(network.state_dict()), network(x)
    network.grow([1, 2])
    out = network(x)
    assert isinstance(out, Output)
    assert [tuple(logits_BC.shape) for logits_BC in out.logits] == [(6, 5)] * 9
    assert all(logits_BC.isfinite().all(0).tolist() == [True, True, True, False, True] for logits_BC in out.logits)
    if per_experience:  # the backbone's own classifier is one that grows
        for now, old in zip(out.logits[:-1], before.logits[:-1], strict=True):
            assert torch.equal(now[:, [0, 4]], old[:, [0, 4]])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    y = torch.tensor([0, 1, 2, 4, 0, 1])
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(logits_BC, y) for logits_BC in network(x).logits)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    back = restore(network, saved)
    assert all(torch.equal(a, b) for a, b in zip(back(x).logits, before.logits, strict=True))
    assert not any(p.requires_grad for p in back.parameters())
    fresh = restore(mixed(per_experience), network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh(x).logits, network(x).logits, strict=True))
    assert not any(p.requires_grad for p in fresh.parameters())


def test_the_final_exit_has_the_same_weights_with_and_without_heads_of_each_experience():
    def built(exits):
        torch.manual_seed(7)
        backbone = small_cnn((1, 8, 8), width=2)
        network = Network(backbone, exits=exits(backbone))
        network.grow([0, 1, 2])
        return network

    plain = built(lambda backbone: [])
    other = built(lambda b: [("block1", make_head("conv", b.tap_shapes["block1"], per_experience=True))])
    assert torch.equal(plain.final.weight, other.final.weight)


def test_heads_on_a_perceptron_learn():
    torch.manual_seed(0)
    backbone = mlp((1, 4, 4), width=16)
    network = Network(backbone, exits=[("layer1", make_head("auto", (16,), per_experience=True))])
    network.grow([0, 1]), network.grow([2])
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        sum(F.cross_entropy(logits_BC, y) for logits_BC in network(x).logits).backward()
        optimizer.step()
    assert all((logits_BC.argmax(1) == y).all() for logits_BC in network(x).logits)


def test_published_heads_have_the_grids_of_the_authors_code():
    """The convolution of conv_large has no padding, and adaptive pooling always returns the whole grid."""
    torch.manual_seed(0)
    head = make_head("conv_large", (4, 28, 28), as_published=True)
    head.grow([0, 1])
    conv, pool = head.layers[1], head.layers[2]
    x = torch.randn(2, 4, 28, 28)
    hidden = F.conv2d(x.relu(), conv.weight, conv.bias, stride=2)
    assert tuple(hidden.shape[2:]) == (13, 13) and conv.padding == (0, 0)
    pooled = pool.a * F.adaptive_max_pool2d(hidden, 4) + (1 - pool.a) * F.adaptive_avg_pool2d(hidden, 4)
    torch.testing.assert_close(head(x), linear(head, pooled.flatten(1)))
    small = make_head("conv", (4, 3, 3), as_published=True)
    small.grow([0, 1])
    conv, pool = small.layers[0], small.layers[2]
    x = torch.randn(2, 4, 3, 3)
    hidden = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
    pooled = pool.a * F.adaptive_max_pool2d(hidden, 4) + (1 - pool.a) * F.adaptive_avg_pool2d(hidden, 4)
    assert small.features == 4 * 4 * 4 and make_head("conv", (4, 3, 3)).features == 4 * 3 * 3
    torch.testing.assert_close(small(x), linear(small, pooled.flatten(1)))


@pytest.mark.parametrize(("pooling", "shape", "grid"), [
    ("2x2", (3, 7, 7), (3, 3)), ("2x2_ceil", (3, 7, 7), (4, 4)), ("2x2_ceil", (3, 8, 5), (4, 3)),
    ("4x4", (3, 8, 8), (2, 2)), ("4x4", (3, 2, 2), (1, 1)), ("4x4", (3, 9, 4), (2, 1)),
])  # fmt: skip
@pytest.mark.parametrize("per_experience", [False, True])
def test_windows_of_the_pooling_head(pooling, shape, grid, per_experience):
    head = make_head("pool", shape, pooling=pooling, per_experience=per_experience)
    assert head.features == 3 * grid[0] * grid[1]
    head.grow([0, 1])
    x = torch.randn(2, *shape)
    if pooling == "2x2_ceil":
        maximum, average = F.adaptive_max_pool2d(x, grid), F.adaptive_avg_pool2d(x, grid)
    else:
        kernel = [min(int(pooling[0]), side) for side in shape[1:]]
        maximum, average = F.max_pool2d(x, kernel), F.avg_pool2d(x, kernel)
    own = head.heads[0] if per_experience else head
    a = next(part.a for part in own.modules() if hasattr(part, "a"))
    torch.testing.assert_close(head(x), linear(own, (a * maximum + (1 - a) * average).flatten(1)))
    with pytest.raises(ConfigError, match=r"^exits\.pooling: found '3x3'; give one of 2x2, 2x2_ceil, 4x4"):
        make_head("pool", shape, pooling="3x3")
