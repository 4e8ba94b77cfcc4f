"""One head for each experience: columns by class, old logits bit for bit, states that bring their heads."""

from __future__ import annotations

import copy
import io
from math import inf

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from clframe.errors import DataError
from clframe.exits.head_kinds import make_head
from clframe.exits.heads import ExitHead, PerExperienceHead, apply_batched_linear
from clframe.nn.heads import GrowingLinear

TAP = (3, 7, 5)


def grown(*steps: list[int], kind: str = "pool", seed: int = 0, cascade: bool = False) -> PerExperienceHead:
    torch.manual_seed(seed)
    head = make_head(kind, TAP, per_experience=True, cascade=cascade)
    for classes in steps:
        head.grow(classes)
    return head


def test_a_head_starts_without_outputs():
    for head in (grown(), make_head("pool", TAP)):
        assert head.classes == 0
        assert head(torch.randn(3, *TAP)).shape == (3, 0)
        assert not head.grow([])
        assert head.classes == 0


def test_logits_are_those_of_the_heads_side_by_side():
    head = grown([0, 1, 2], [3, 4])
    x = torch.randn(4, *TAP)
    shared = head.common(x)
    assert len(head.heads) == 2
    assert head.heads[0].layers[0].a.item() != head.heads[1].layers[0].a.item()
    assert torch.equal(head(x), torch.cat([inner(shared) for inner in head.heads], 1))
    assert [inner.classes for inner in head.heads] == [3, 2]


@pytest.mark.parametrize("shape", [(3, 7, 5), (16, 8, 8), (1, 2, 2), (5, 1, 9)], ids=str)
@pytest.mark.parametrize("batch", [1, 13])
def test_sharing_the_pooling_changes_nothing(shape, batch):
    """The plain reference: every experience's head pools for itself."""
    torch.manual_seed(0)
    head = make_head("pool", shape, per_experience=True)
    for classes in ([0, 1], [2, 3, 4], [5], [6, 7]):
        head.grow(classes)
    x = torch.randn(batch, *shape, requires_grad=True)
    alone = []
    for inner in head.heads:
        plain = make_head("pool", shape)
        plain.layers[1].a = inner.layers[0].a
        plain.classifier = inner.classifier
        alone.append(plain)
    parameters = [x, *head.parameters()]
    logits_BC, plain_BC = head(x), torch.cat([plain(x) for plain in alone], 1)
    # One product over shared inputs and one product per head may run different BLAS kernels, which round differently.
    torch.testing.assert_close(logits_BC, plain_BC, rtol=1e-5, atol=1e-6)
    fast = torch.autograd.grad(logits_BC.square().sum(), parameters)
    slow = torch.autograd.grad(plain_BC.square().sum(), parameters)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[3], [2, 2, 2], [4, 1, 1, 3], [1, 2]], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_products_of_all_heads_may_be_joined(sizes, batch):
    """The way of accelerators, against one product after the other."""
    torch.manual_seed(0)
    classifiers = [GrowingLinear(6).double() for _ in sizes]
    for classifier, size in zip(classifiers, sizes, strict=True):
        classifier.grow(range(size))
    x = torch.randn(len(sizes), batch, 6, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for classifier in classifiers for p in classifier.parameters())]
    plain = torch.cat([classifier(features) for classifier, features in zip(classifiers, x, strict=True)], 1)
    slow = torch.autograd.grad(plain.square().sum(), parameters)
    for features in (x, list(x)):
        with FlopCounterMode(display=False) as counter:
            joined = torch.cat(apply_batched_linear(classifiers, features), 1)
        assert counter.get_total_flops() == 2 * batch * 6 * sum(sizes)
        torch.testing.assert_close(joined, plain)
        fast = torch.autograd.grad(joined.square().sum(), parameters)
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("kind", ["pool", "conv", "hidden"])
def test_growth_keeps_old_logits_bit_for_bit(kind):
    head = grown([0, 1], kind=kind)
    x = torch.randn(3, *TAP)
    before = head(x).clone()
    parameters = list(head.parameters())
    assert head.grow([2])
    assert torch.equal(head(x)[:, :2], before)
    assert all(a is b for a, b in zip(parameters, head.parameters(), strict=False))
    assert head.grow([7, 5])
    assert torch.equal(head(x)[:, :2], before)


def test_growing_for_known_classes_changes_nothing_and_draws_nothing():
    head = grown([0, 1], [4])
    state = torch.get_rng_state()
    assert not head.grow([1, 4])
    assert not head.grow(iter([0]))
    assert len(head.heads) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_columns_are_classes_whatever_the_order_they_come_in():
    head = grown([5, 2], [2, 0, 7], [5])
    x = torch.randn(3, *TAP)
    logits_BC = head(x)
    shared = head.common(x)
    assert head.head_of.tolist() == [1, -1, 0, -1, -1, 0, -1, 1]
    assert len(head.heads) == 2
    # A head called alone sees another memory layout than inside the joined call: another kernel, other rounding.
    torch.testing.assert_close(logits_BC[:, [2, 5]], head.heads[0](shared), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_BC[:, [0, 7]], head.heads[1](shared), rtol=1e-5, atol=1e-6)
    assert (logits_BC[:, [1, 3, 4, 6]] == -inf).all()
    head.grow([1, 3, 4, 6])
    torch.testing.assert_close(head(x)[:, [0, 2, 5, 7]], logits_BC[:, [0, 2, 5, 7]], rtol=1e-5, atol=1e-6)
    assert head(x).isfinite().all()


def test_gradients_arrive_and_gaps_have_probability_zero():
    head = grown([3, 0], [5])
    cross_entropy(head(torch.randn(6, *TAP)), torch.tensor([0, 3, 5] * 2)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())
    assert head(torch.randn(2, *TAP)).softmax(1)[:, [1, 2, 4]].eq(0).all()


def test_one_class_and_one_sample():
    assert grown([0])(torch.randn(1, *TAP)).softmax(1).tolist() == [[1.0]]
    assert grown([2])(torch.randn(1, *TAP)).softmax(1).tolist() == [[0.0, 0.0, 1.0]]


def test_a_negative_class_is_an_error_and_leaves_the_head_alone():
    head = grown([0, 1])
    with pytest.raises(DataError, match=r"^classes: found class -1; number the classes from 0$"):
        head.grow([4, -1])
    assert head.classes == 2
    assert len(head.heads) == 1


def test_new_heads_follow_seed_type_trainability_and_mode():
    assert torch.equal(grown([0], [1], seed=3)(torch.ones(1, *TAP)), grown([0], [1], seed=3)(torch.ones(1, *TAP)))
    assert not torch.equal(grown([0], seed=3).heads[0].classifier.weight, grown([0], seed=4).heads[0].classifier.weight)
    for steps in ([], [[0, 1]]):  # before the first head there is an anchor to follow
        head = grown(*steps).to(torch.float64).requires_grad_(False).eval()
        head.grow([2])
        assert {p.dtype for p in head.parameters()} == {torch.float64}
        assert not any(p.requires_grad for p in head.parameters())
        assert not any(module.training for module in head.modules())
        assert head(torch.randn(2, *TAP, dtype=torch.float64)).dtype == torch.float64
        assert {name for name, _ in head.named_parameters() if "anchor" in name} == set()


def test_new_heads_are_drawn_on_the_cpu_whatever_the_default_device():
    head = grown()
    torch.manual_seed(5)
    with torch.device("meta"):
        head.grow([0, 1])
    torch.manual_seed(5)
    plain = grown([], seed=9)
    torch.manual_seed(5)
    plain.grow([0, 1])
    assert torch.equal(head.heads[0].classifier.weight, plain.heads[0].classifier.weight)


@pytest.mark.parametrize("saved", [[], [[0, 1]], [[0, 1], [2], [3, 4]], [[4, 1], [0]]], ids=str)
@pytest.mark.parametrize("into", [[], [[0, 1, 2]], [[0], [5], [1]]], ids=str)
@pytest.mark.parametrize(("kind", "cascade"), [("pool", False), ("conv", True)])
def test_a_state_of_any_number_of_experiences_brings_its_heads(saved, into, kind, cascade):
    source = grown(*saved, kind=kind, cascade=cascade, seed=1)
    target = grown(*into, kind=kind, cascade=cascade, seed=2).requires_grad_(False)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    generator = torch.get_rng_state()
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.get_rng_state(), generator)
    x, previous_BC = torch.randn(3, *TAP), torch.randn(3, 9)
    assert torch.equal(target(x, previous_BC), source(x, previous_BC))
    assert not any(p.requires_grad for p in target.parameters())
    for head in (source, target):
        torch.manual_seed(6)
        head.grow([6, 1])
    assert torch.equal(target(x, previous_BC), source(x, previous_BC))
    assert source.state_dict().keys() == target.state_dict().keys()


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch|Unexpected key"):
        grown([0, 1]).load_state_dict(grown([0, 1], kind="conv").state_dict())


def test_copies_are_independent():
    head = grown([0, 2], [1])
    twin = copy.deepcopy(head)
    x = torch.randn(3, *TAP)
    before = head(x)
    assert torch.equal(twin(x), before)
    twin.grow([5])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(head(x), before)
    assert len(head.heads) == 2
    head.grow([3])
    assert head.head_of.tolist() == [0, 1, 0, 2]
    assert twin.head_of.tolist() == [0, 1, 0, -1, -1, 2]


def test_functional_transforms_give_each_samples_gradient():
    head = grown([3, 0], [1])
    x, y = torch.randn(4, *TAP), torch.tensor([0, 3, 1, 0])
    parameters = {name: p.detach() for name, p in head.named_parameters()}

    def loss(parameters, x, y):
        return cross_entropy(functional_call(head, parameters, (x[None],)), y[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for sample in range(4):
        head.zero_grad()
        cross_entropy(head(x[sample : sample + 1]), y[sample : sample + 1]).backward()
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(per_sample[name][sample], parameter.grad)


def test_one_growing_head_keeps_its_rows():
    torch.manual_seed(0)
    head = ExitHead(nn.Flatten(), features=105)
    assert head.grow([0, 3])
    row, x = head.classifier.weight[3].detach().clone(), torch.randn(2, *TAP)
    before = head(x)
    assert head.grow([4])
    assert torch.equal(head.classifier.weight[3], row)
    torch.testing.assert_close(head(x)[:, :4], before)
    assert head.features == 105
    assert head.classes == 5
    assert head.classifier.seen.tolist() == [True, False, False, True, True]
