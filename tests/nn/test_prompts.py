"""Prompts among the tokens of a frozen vision transformer."""

from __future__ import annotations

import copy

import pytest
import torch

from clframe.errors import ConfigError, UnsupportedError
from clframe.exits import make_head
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.nn import BACKBONES, Network, freeze, restore
from clframe.nn.backbones import Backbone
from clframe.nn.prompts import PromptPool, add_prompts, prompt_pool


def vit(*, exits=(), read="prompts", prompted=True, backbone=None):
    torch.manual_seed(0)
    backbone = backbone or BACKBONES.get("vit_tiny")((1, 8, 8), width=16, depth=3, heads=2)
    heads = [(tap, make_head("auto", backbone.tap_shapes[tap])) for tap in exits]
    network = Network(backbone, exits=heads)
    if prompted:
        width = backbone.features
        add_prompts(network, PromptPool(width, pool=6, length=2, top=3), read=read, where="components.l2p")
    network.grow(range(3))
    return network


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_taps_are_of_the_declared_shapes_and_prompts_follow_the_first_token():
    plain, network = vit(prompted=False), vit()
    names = network.backbone.names
    assert names == ("embed", "query", "prompt", "encoder.0", "encoder.1", "encoder.2", "cls")
    with torch.no_grad():
        taps, before = network.eval()(X, taps=names).taps, plain.eval()(X, taps=["embed", "cls"]).taps
    assert {name: tuple(tap.shape[1:]) for name, tap in taps.items()} == network.backbone.tap_shapes
    assert network.backbone.tap_shapes["embed"] == (5, 16) and network.backbone.tap_shapes["encoder.1"] == (11, 16)
    torch.testing.assert_close(taps["query"], before["cls"])  # the untouched backbone's feature
    pool = prompt_pool(network)
    similarity = torch.nn.functional.cosine_similarity(taps["query"][:, None], pool.keys[None], dim=2)
    chosen = similarity.argsort(dim=1, descending=True)[:, :3]
    for sample in range(4):
        prompts = torch.cat([pool.prompts[i] for i in chosen[sample].tolist()])
        expected = torch.cat([before["embed"][sample, :1], prompts, before["embed"][sample, 1:]])
        torch.testing.assert_close(taps["prompt"][sample], expected)


@pytest.mark.parametrize("read", ["first", "prompts"])
def test_the_last_tap_reads_the_class_token_or_the_mean_of_prompts(read):
    network = vit(read=read)
    with torch.no_grad():
        taps = network.eval()(X, taps=["encoder.2", "cls"]).taps
    norm = network.backbone.stages[1]._rest[-1].stage.norm
    expected = norm(taps["encoder.2"])
    expected = expected[:, 0] if read == "first" else expected[:, 1:7].mean(1)
    torch.testing.assert_close(taps["cls"], expected.detach())


def test_only_prompts_and_classifiers_learn_and_the_backbone_stays_in_evaluation_mode():
    torch.manual_seed(0)
    backbone = BACKBONES.get("vit_tiny")((1, 8, 8), width=16, depth=3, heads=2, dropout=0.5)
    network = vit(exits=["encoder.0", "encoder.1"], backbone=backbone).train()
    a, b = network(X), network(X)
    assert all(torch.equal(p, q) for p, q in zip(a.logits, b.logits, strict=True))  # dropout is off
    loss = sum(logits.square().sum() for logits in a.logits)
    similarity, _ = prompt_pool(network).select(network(X, taps=["query"]).taps["query"])
    (loss + similarity.sum()).backward()
    learning = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name in learning if name.startswith("backbone")} == {
        "backbone.stages.2.keys", "backbone.stages.2.prompts"}  # fmt: skip
    assert sum(name.startswith("heads") for name in learning) == 10


def test_a_sample_is_answered_alike_in_any_batch():
    network = vit(exits=["encoder.0"]).eval()
    with torch.no_grad():
        whole, single = network(X), [network(x[None]) for x in X]
    for exit in range(2):
        torch.testing.assert_close(whole.logits[exit], torch.cat([s.logits[exit] for s in single]))


def test_no_weight_is_listed_twice_and_copies_share_nothing():
    plain, network = vit(prompted=False), vit(exits=["encoder.0"])
    count = sum(tensor.numel() for tensor in plain.backbone.state_dict().values())
    assert sum(tensor.numel() for tensor in network.backbone.state_dict().values()) == count + 6 * 16 + 6 * 2 * 16
    frozen = freeze(network)
    with torch.no_grad():
        expected = [logits.clone() for logits in network.eval()(X).logits]
        for parameter in network.parameters():
            parameter.add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(frozen(X).logits, expected, strict=True))
        again = restore(network, frozen.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(again(X).logits, expected, strict=True))
        twin = copy.deepcopy(network).double()
        assert twin(X.double()).last.dtype == torch.float64
    assert twin.backbone.stages[1]._rest[0] is twin.backbone.stages[3]


@pytest.mark.parametrize("threshold", [0.0, 0.36, 1.1])
def test_dynamic_inference_answers_as_the_static_network(threshold):
    network = vit()
    shapes = network.backbone.tap_shapes  # an exit on the query is one on the frozen features
    network.attach([(tap, make_head("auto", shapes[tap])) for tap in ("query", "encoder.0", "encoder.1")])
    network.grow(range(3))
    scores, exit_B = DynamicNetwork(network, ExitPolicy(thresholds=threshold), compact=0)(X)
    with torch.no_grad():
        logits = network.eval()(X).logits
    for sample in range(4):
        sure = [k for k in range(3) if logits[k][sample].softmax(0).max() >= threshold]
        first = sure[0] if sure else 3
        assert exit_B[sample] == first
        torch.testing.assert_close(scores[sample], logits[first][sample])


def test_timms_transformers_take_prompts():
    timm = pytest.importorskip("timm")
    assert timm
    backbone = BACKBONES.get("timm")((3, 32, 32), model="test_vit")
    network = vit(backbone=backbone)
    with torch.no_grad():
        taps = network.eval()(torch.randn(2, 3, 32, 32), taps=network.backbone.names).taps
    assert {name: tuple(tap.shape[1:]) for name, tap in taps.items()} == network.backbone.tap_shapes


@pytest.mark.parametrize("name, shape", [("resnet20", (1, 8, 8)), ("mlp", (1, 8, 8))])
def test_backbones_without_tokens_are_refused(name, shape):
    network = Network(BACKBONES.get(name)(shape))
    pool = PromptPool(network.backbone.features, pool=2, length=1, top=1)
    with pytest.raises(UnsupportedError, match=r"components\.l2p: found a backbone with taps .*; prompts need the tokens"):
        add_prompts(network, pool, read="first", where="components.l2p")


def test_a_last_stage_that_averages_the_patches_reads_the_first_token_only():
    class Mean(torch.nn.Module):
        def forward(self, tokens_BTD):
            return tokens_BTD[:, 1:].mean(1)

    base = BACKBONES.get("vit_tiny")((1, 8, 8), width=16, depth=1, heads=2)
    stages = list(zip(base.names, [*base.stages[:-1], Mean()], base.tap_shapes.values(), strict=True))
    with pytest.raises(UnsupportedError, match="cannot read single tokens; set read=first"):
        vit(backbone=Backbone(stages, input_shape=(1, 8, 8)))
    assert vit(backbone=Backbone(stages, input_shape=(1, 8, 8)), read="first")(X).last.shape == (4, 3)


def test_prompts_are_added_once_and_of_the_right_width():
    network = vit()
    with pytest.raises(ConfigError, match="l2p: found prompts in the backbone already; add them once"):
        add_prompts(network, PromptPool(16, pool=2, length=1, top=1), read="first", where="l2p")
    with pytest.raises(ConfigError, match="l2p: found prompts of width 8; give the tokens' 16"):
        add_prompts(vit(prompted=False), PromptPool(8, pool=2, length=1, top=1), read="first", where="l2p")
