"""The cascade is a wider linear layer; it starts at zero, and growing moves nothing."""

from __future__ import annotations

import copy
from math import inf

import pytest
import torch
from torch.nn import functional as F

from clframe.errors import ConfigError, DataError
from clframe.exits.head_kinds import make_head
from clframe.exits.heads import ExitHead
from clframe.exits.layers import Cascade
from clframe.nn import Network
from clframe.nn.backbones import small_cnn


def learned(*steps: list[int], norm: bool = False, seed: int = 0) -> Cascade:
    """A cascade whose matrix, gains and shifts are not what they started with."""
    cascade = Cascade(norm=norm)
    torch.manual_seed(seed)
    for inputs in steps:
        cascade.grow(max(inputs) + 1, inputs=inputs)
        with torch.no_grad():
            for parameter in cascade.parameters():
                parameter.add_(torch.randn_like(parameter))
    return cascade


def test_it_is_the_linear_layer_on_concatenated_features_and_logits():
    torch.manual_seed(0)
    head = ExitHead(torch.nn.Identity(), features=6, cascade=learned([0, 1, 2]))
    head.grow([0, 1, 2])
    assert head.cascades
    x, previous_BC = torch.randn(4, 6), torch.randn(4, 3)
    wide = torch.cat([head.classifier.weight, head.cascade.weight], 1)
    expected = F.linear(torch.cat([x, previous_BC], 1), wide, head.classifier.bias)
    torch.testing.assert_close(head(x, previous_BC), expected)
    assert torch.equal(head(x), head.classifier(x))


def test_with_a_norm_it_is_layer_norm_then_linear():
    cascade = learned([0, 1, 2, 3], norm=True)
    previous_BC = torch.randn(5, 4)
    mean = previous_BC.mean(1, keepdim=True)
    variance = ((previous_BC - mean) ** 2).mean(1, keepdim=True)
    normal = (previous_BC - mean) / (variance + 1e-5).sqrt() * cascade.gain + cascade.shift
    torch.testing.assert_close(cascade(previous_BC), normal @ cascade.weight.T)


def test_it_starts_at_zero_and_draws_nothing():
    cascade, state = Cascade(norm=True), torch.get_rng_state()
    assert cascade.grow(3, inputs=[0, 1, 2])
    assert not cascade.grow(3, inputs=[2, 0])
    assert torch.equal(torch.get_rng_state(), state)
    assert (cascade(torch.randn(4, 3)) == 0).all()
    cascade(torch.randn(4, 3)).square().sum().backward()
    assert cascade.gain.tolist() == [1.0] * 3
    assert cascade.shift.tolist() == [0.0] * 3


def test_growing_changes_no_logits():
    cascade = learned([0, 1])
    previous_BC = torch.randn(4, 5)
    before, old = cascade(previous_BC), cascade.weight.detach().clone()
    cascade.grow(5, inputs=[2, 3, 4])
    assert torch.equal(cascade.weight[:2, :2], old)
    assert (cascade.weight[2:] == 0).all()
    assert (cascade.weight[:, 2:] == 0).all()
    torch.testing.assert_close(cascade(previous_BC)[:, :2], before)
    assert (cascade(previous_BC)[:, 2:] == 0).all()


def test_new_columns_learn():
    cascade = learned([0, 1])
    cascade.grow(3, inputs=[2])
    previous_BC = torch.randn(6, 3)
    F.cross_entropy(cascade(previous_BC), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert (cascade.weight.grad != 0).all()


def test_classes_not_met_count_as_zero_and_never_make_nan():
    cascade = learned([0, 1, 2])
    previous_BC = torch.randn(4, 3)
    hidden, zero = previous_BC.clone(), previous_BC.clone()
    hidden[:, 1], zero[:, 1] = -inf, 0
    assert torch.equal(cascade(hidden), cascade(zero))
    norm = learned([0, 1, 2], norm=True)
    assert torch.equal(norm(hidden), norm(zero))
    only = learned([0], norm=True)
    assert only(torch.full((2, 1), -inf)).isfinite().all()


def test_gaps_have_no_columns_until_they_are_met():
    cascade = learned([1, 4])
    assert cascade.weight.shape == (5, 2)
    previous_BC = torch.randn(3, 5)
    before = cascade(previous_BC)
    torch.testing.assert_close(before, previous_BC[:, [1, 4]] @ cascade.weight.T)
    assert cascade.grow(5, inputs=[0])
    assert cascade.inputs.tolist() == [1, 4, 0]
    torch.testing.assert_close(cascade(previous_BC), before)


def test_later_classes_are_ignored_and_missing_ones_an_error():
    cascade = learned([0, 1])
    previous_BC = torch.randn(3, 4)
    assert torch.equal(cascade(previous_BC), cascade(previous_BC[:, :2]))
    message = r"^exits\.cascade: found 1 logits of the previous exit, expected 2; grow all heads for the same classes$"
    with pytest.raises(ConfigError, match=message):
        cascade(previous_BC[:, :1])
    with pytest.raises(DataError, match=r"^classes: found class -1"):
        cascade.grow(3, inputs=[-1])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("saved", [[0], [0, 1, 2, 3], [3, 1]], ids=str)
def test_a_state_of_another_size_brings_its_size(saved, norm):
    source, target = learned(saved, norm=norm, seed=1), learned([0, 1, 2], norm=norm)
    target.requires_grad_(False)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    previous_BC = torch.randn(3, 5)
    assert torch.equal(target(previous_BC), source(previous_BC))
    assert not any(p.requires_grad for p in target.parameters())
    assert target.grow(5, inputs=[4]) and source.grow(5, inputs=[4])
    assert torch.equal(target.inputs, source.inputs)


def test_type_and_trainability_survive_growth():
    cascade = learned([0, 1], norm=True).double().requires_grad_(False)
    cascade.grow(4, inputs=[2, 3])
    assert {p.dtype for p in cascade.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in cascade.parameters())


def cascaded(*, cascade: bool = True, per_experience: bool = False, norm: bool = False) -> Network:
    torch.manual_seed(0)
    backbone = small_cnn((3, 11, 9), width=4)
    shapes = backbone.tap_shapes
    first = make_head("pool", shapes["block1"], per_experience=per_experience)
    second = make_head(
        "pool", shapes["block2"], cascade=cascade, cascade_norm=norm, per_experience=per_experience
    )
    return Network(backbone, exits=[("block1", first), ("block2", second)])


@pytest.mark.parametrize("per_experience", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_later_exit_never_moves_the_earlier_head(per_experience, norm):
    network = cascaded(per_experience=per_experience, norm=norm)
    network.grow([0, 1])
    network.grow([2])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "cascade" in name:
                parameter.add_(torch.randn_like(parameter))
    x, y = torch.randn(6, 3, 11, 9), torch.tensor([0, 1, 2] * 2)
    out = network(x)
    F.cross_entropy(out.logits[1], y).backward()
    assert all(p.grad is None for p in network.heads[0].parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in network.heads[1].named_parameters() if "gain" not in name)
    assert not torch.equal(out.logits[1], network.heads[1](network.backbone.stages[1](network.backbone.stages[0](x))))


@pytest.mark.parametrize("per_experience", [False, True])
def test_a_new_cascade_changes_no_logits(per_experience):
    plain, with_cascade = cascaded(cascade=False, per_experience=per_experience), cascaded(per_experience=per_experience)
    torch.manual_seed(1), plain.grow([0, 1, 4])
    torch.manual_seed(1), with_cascade.grow([0, 1, 4])
    x = torch.randn(2, 3, 11, 9)
    for one, other in zip(plain(x).logits, with_cascade(x).logits, strict=True):
        assert torch.equal(one, other)
    assert with_cascade(x).logits[1].softmax(1)[:, [2, 3]].eq(0).all()


def test_an_experiences_head_takes_in_the_classes_known_when_it_was_made():
    head = make_head("linear", (6,), per_experience=True, cascade=True)
    head.grow([0, 1])
    head.grow([2, 3, 4])
    assert [tuple(h.cascade.weight.shape) for h in head.heads] == [(2, 2), (3, 5)]
    with torch.no_grad():
        for inner in head.heads:
            inner.cascade.weight.normal_()
    x, previous_BC = torch.randn(3, 6), torch.randn(3, 5)
    expected = [
        head.heads[0].classifier(x) + previous_BC[:, :2] @ head.heads[0].cascade.weight.T,
        head.heads[1].classifier(x) + previous_BC @ head.heads[1].cascade.weight.T,
    ]
    logits_BC = head(x, previous_BC)
    torch.testing.assert_close(logits_BC, torch.cat(expected, 1))
    before = logits_BC.clone()
    head.grow([5])
    assert torch.equal(head(x, torch.cat([previous_BC, torch.randn(3, 1)], 1))[:, :5], before)
