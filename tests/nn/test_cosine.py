"""Cosine classifiers: formula, growth, states, fixed rows, one scale per exit, replacing the classifier of any exit."""

from __future__ import annotations

import copy
from functools import partial
from math import exp, inf, sqrt

import pytest
import torch
from torch.nn.functional import cross_entropy

from clframe.errors import UnsupportedError
from clframe.exits import make_head
from clframe.exits.fusion import fuse_batch_norm
from clframe.exits.heads import PerExperienceHead, apply_batched_linear, apply_each_linear
from clframe.nn import GrowingLinear, Network, freeze, restore
from clframe.nn.backbones import small_cnn
from clframe.nn.heads import CosineLinear


def grown(*steps, proxies=1, seed=0, scale=2.0):
    torch.manual_seed(seed)
    head = CosineLinear(6, proxies=proxies, scale=scale)
    for classes in steps:
        head.grow(classes)
    return head


def network(*steps, per_experience=True, seed=0, proxies=1):
    torch.manual_seed(seed)
    backbone = small_cnn((1, 8, 8), width=4)
    shapes = backbone.tap_shapes
    exits = [(tap, make_head("pool", shapes[tap], per_experience=per_experience)) for tap in ("block1", "block2")]
    net = Network(backbone, exits=exits)
    net.classify_with(partial(CosineLinear, scale=3.0, proxies=proxies))
    for classes in steps:
        net.grow(classes)
    return net


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_logits_are_the_formula():
    head, x = grown([0, 1], [2]).requires_grad_(False), torch.randn(3, 6)
    longhand = [[2.0 * cosine(head.weight[c], x[b]) for c in range(3)] for b in range(3)]
    torch.testing.assert_close(head(x), torch.tensor(longhand))


def test_similarity_to_proxies_is_the_formula():
    head, x = grown([0, 1], proxies=3).requires_grad_(False), torch.randn(2, 6)
    longhand = []
    for b in range(2):
        cosines = [[cosine(head.weight[c, p], x[b]) for p in range(3)] for c in range(2)]
        longhand.append([2.0 * sum(exp(s) * s for s in row) / sum(exp(s) for s in row) for row in cosines])
    torch.testing.assert_close(head(x), torch.tensor(longhand))


@pytest.mark.parametrize("proxies", [1, 4])
def test_growth_gaps_states_and_copies(proxies):
    head, x = grown([0, 2], proxies=proxies), torch.randn(3, 6)
    before = head(x)
    assert (before[:, 1] == -inf).all() and head.classes == 3
    assert head.grow([4]) and not head.grow([1])
    torch.testing.assert_close(head(x)[:, [0, 2]], before[:, [0, 2]])
    other = grown([0], proxies=proxies, seed=5, scale=9.0)
    assert not other.load_state_dict(copy.deepcopy(head.state_dict())).missing_keys
    assert torch.equal(other(x), head(x))
    smaller = grown([0], proxies=proxies, seed=7)
    other.load_state_dict(smaller.state_dict())
    assert torch.equal(other(x), smaller(x)) and other.classes == 1
    twin = copy.deepcopy(head)
    twin.grow([7])
    with torch.no_grad():
        twin.weight.zero_(), twin.eta.zero_()
    torch.testing.assert_close(head(x)[:, [0, 2]], before[:, [0, 2]])
    assert grown(proxies=proxies)(x).shape == (3, 0)


def test_length_of_a_row_or_of_features_changes_nothing():
    head, x = grown([0, 1, 2]), torch.randn(3, 6)
    before = head(x)
    with torch.no_grad():
        head.weight[1] *= 7
    torch.testing.assert_close(head(0.1 * x), before)


@pytest.mark.parametrize("kind", [GrowingLinear, CosineLinear, partial(CosineLinear, proxies=2)])
def test_fixed_rows_have_no_gradient_and_others_the_one_they_had(kind):
    torch.manual_seed(0)
    head, x, y = kind(6), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 3])
    head.grow(range(4))
    cross_entropy(head(x), y).backward()
    free, before = head.weight.grad.clone(), head(x)
    head.zero_grad()
    head.fix([0, 2, 9])
    assert torch.equal(head(x), before)
    cross_entropy(head(x), y).backward()
    assert (head.weight.grad[[0, 2]] == 0).all()
    assert torch.equal(head.weight.grad[[1, 3]], free[[1, 3]])
    head.grow([4])
    assert head.fixed.tolist() == [True, False, True, False, False]
    head.fix([])
    assert head.weight is head.detach_fixed(head.weight)
    assert "fixed" not in head.state_dict()


@pytest.mark.parametrize("per_experience", [True, False])
def test_every_exit_of_a_network_has_them_with_one_scale_each(per_experience):
    net = network([0, 1], [2, 3], [4], per_experience=per_experience)
    x = torch.randn(3, 1, 8, 8)
    for head, logits_BC in zip(net.heads, net(x).logits, strict=True):
        assert logits_BC.shape == (3, 5)
        assert head.scale.item() == 3.0
        assert (logits_BC.abs() <= 3.0).all()
    if per_experience:
        first = net.heads[0]
        assert isinstance(first, PerExperienceHead) and len(first.heads) == 3
        assert len({id(inner.classifier.eta) for inner in first.heads}) == 1
    assert sum(name.endswith("eta") for name, _ in net.named_parameters()) == 3
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.heads[0].scale.mul_(2)
    torch.testing.assert_close(twin(x).logits[0], 2 * net(x).logits[0])
    torch.testing.assert_close(fuse_batch_norm(net)(x).logits, net.eval()(x).logits)


@pytest.mark.parametrize("per_experience", [True, False])
@pytest.mark.parametrize("proxies", [1, 3])
def test_teachers_of_fewer_classes_come_back_from_a_network_that_grew(per_experience, proxies):
    net = network([0, 1], per_experience=per_experience, proxies=proxies)
    teacher, x = freeze(net), torch.randn(2, 1, 8, 8)
    net.grow([2, 3])
    with torch.no_grad():
        net.heads[0].scale.add_(1)
    again = restore(net, teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again(x).logits, teacher(x).logits, strict=True))
    assert not any(p.requires_grad for p in again.parameters())
    again.grow([2])
    for one, other in zip(again(x).logits, teacher(x).logits, strict=True):
        torch.testing.assert_close(one[:, :2], other)


@pytest.mark.parametrize("per_experience", [True, False])
def test_rows_are_fixed_by_class_whatever_head_holds_them(per_experience):
    net = network([0, 3], [1, 2], per_experience=per_experience)
    for head in net.heads:
        head.fix([1, 3])
    x, y = torch.randn(8, 1, 8, 8), torch.arange(4).repeat(2)
    sum(cross_entropy(logits_BC, y) for logits_BC in net(x).logits).backward()
    assert net.final.weight.grad[[1, 3]].eq(0).all() and net.final.weight.grad[[0, 2]].ne(0).any(1).all()
    for head in net.heads[:-1]:
        if per_experience:
            (zero, three), (one, two) = (inner.classifier.weight.grad for inner in head.heads)
        else:
            zero, one, two, three = head.classifier.weight.grad
        assert one.eq(0).all() and three.eq(0).all() and zero.ne(0).any() and two.ne(0).any()


def test_exits_attached_later_have_them_too():
    backbone = small_cnn((1, 8, 8), width=4)
    net = Network(backbone)
    net.classify_with(partial(CosineLinear, scale=4.0, learn_scale=False))
    net.attach([("block1", make_head("pool", backbone.tap_shapes["block1"]))])
    net.grow([0, 1])
    assert [float(head.scale) for head in net.heads] == [4.0, 4.0]
    assert not any(name.endswith("eta") for name, _ in net.named_parameters())


def test_classes_that_are_learnt_keep_their_classifier():
    net = network([0, 1])
    with pytest.raises(UnsupportedError, match=r"^classifiers: found a head with 2 classes; change classifiers before"):
        net.classify_with(GrowingLinear)


def test_changing_the_kind_draws_nothing():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    net = network(seed=3)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    plain = small_cnn((1, 8, 8), width=4)
    exits = [(tap, make_head("pool", plain.tap_shapes[tap], per_experience=True)) for tap in ("block1", "block2")]
    Network(plain, exits=exits)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)
    assert net.classes == 0


def test_products_that_are_joined_hold_fixed_rows_still_and_cosines_are_never_joined():
    torch.manual_seed(0)
    linear = [GrowingLinear(6) for _ in range(2)]
    for head in linear:
        head.grow([0, 1])
    linear[0].fix([1])
    torch.cat(apply_batched_linear(linear, torch.randn(2, 3, 6))).sum().backward()
    assert linear[0].weight.grad[1].eq(0).all() and linear[0].bias.grad.tolist() == [3.0, 0.0]
    assert linear[1].weight.grad.ne(0).all()
    on_accelerator = [grown([0, 1]).to("meta"), grown([0]).to("meta")]
    parts = apply_each_linear(on_accelerator, torch.empty(2, 5, 6, device="meta"))
    assert [tuple(part.shape) for part in parts] == [(5, 2), (5, 1)]
