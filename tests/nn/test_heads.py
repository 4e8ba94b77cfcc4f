"""The laws of growing: old rows stay, gaps never receive probability, states bring their own size."""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from clframe.errors import DataError
from clframe.nn import GrowingLinear


def grown(*steps: list[int], features: int = 6, seed: int = 0) -> GrowingLinear:
    torch.manual_seed(seed)
    head = GrowingLinear(features)
    for classes in steps:
        head.grow(classes)
    return head


def test_a_head_starts_without_outputs():
    head = GrowingLinear(6)
    assert head.classes == 0
    assert head(torch.randn(3, 6)).shape == (3, 0)
    assert not head.grow([])
    assert head.classes == 0


def test_old_rows_are_kept_bit_for_bit_and_new_ones_differ():
    head = grown([0, 1, 2])
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    x = torch.randn(4, 6)
    before = head(x)
    old = head.weight
    assert head.grow([3, 4])
    assert head.weight is not old
    assert head.classes == 5
    assert torch.equal(head.weight[:3], weight)
    assert torch.equal(head.bias[:3], bias)
    assert head.weight[3:].unique().numel() == 12
    torch.testing.assert_close(head(x)[:, :3], before)


def test_growing_for_known_classes_changes_nothing_and_draws_nothing():
    head = grown([0, 1, 2, 3])
    weight, state = head.weight, torch.get_rng_state()
    assert not head.grow([1, 3])
    assert not head.grow([0, 1, 2, 3])
    assert head.weight is weight
    assert torch.equal(torch.get_rng_state(), state)


def test_new_rows_are_drawn_as_linear_draws_them():
    torch.manual_seed(5)
    linear = nn.Linear(6, 7)
    head = grown(list(range(7)), seed=5)
    torch.testing.assert_close(head.weight, linear.weight)
    torch.testing.assert_close(head.bias, linear.bias)
    wide = grown(list(range(200)), features=25)
    assert 0.99 / 5 < wide.weight.abs().max().item() <= 1 / 5
    assert abs(wide.weight.std().item() - 1 / sqrt(3 * 25)) < 0.003
    assert 0.9 / 5 < wide.bias.abs().max().item() <= 1 / 5


def test_logits_are_the_formula():
    head = grown([0, 1], [2]).requires_grad_(False)
    x = torch.randn(5, 6)
    longhand = [
        [sum(x[b, f] * head.weight[c, f] for f in range(6)) + head.bias[c] for c in range(3)]
        for b in range(5)
    ]
    torch.testing.assert_close(head(x), torch.tensor(longhand))


def test_classes_in_gaps_have_probability_zero_and_no_gradient():
    head = grown([5, 2], [7])
    x, y = torch.randn(9, 6), torch.tensor([2, 5, 7] * 3)
    probability_BC = head(x).softmax(1)
    unseen = [0, 1, 3, 4, 6]
    assert head.classes == 8
    assert (probability_BC[:, unseen] == 0).all()
    torch.testing.assert_close(probability_BC[:, [2, 5, 7]].sum(1), torch.ones(9))
    cross_entropy(head(x), y).backward()
    assert (head.weight.grad[unseen] == 0).all()
    assert (head.bias.grad[unseen] == 0).all()
    assert head.weight.grad.isfinite().all()
    assert (head.weight.grad[[2, 5, 7]] != 0).all()


def test_a_gap_that_is_met_opens_without_new_parameters():
    head = grown([0, 3])
    weight = head.weight
    row = weight[1].detach().clone()
    assert not head.grow([1])
    assert head.weight is weight
    assert torch.equal(head.weight[1], row)
    logits_BC = head(torch.randn(2, 6))
    assert logits_BC.isfinite().all(0).tolist() == [True, True, False, True]
    head.grow([2])
    assert head(torch.randn(2, 6)).isfinite().all()


def test_one_class_and_one_sample():
    head = grown([0])
    assert head(torch.randn(1, 6)).softmax(1).tolist() == [[1.0]]
    only = grown([3])(torch.randn(1, 6)).softmax(1)
    assert only.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_a_negative_class_is_an_error_and_leaves_the_head_alone():
    head = grown([0, 1])
    with pytest.raises(DataError, match=r"^classes: found class -1; number the classes from 0$"):
        head.grow([4, -1])
    assert head.classes == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_and_trainability_survive_growth(dtype):
    head = grown([0, 1]).to(dtype)
    head.requires_grad_(False)
    head.grow([2])
    assert {p.dtype for p in head.parameters()} == {dtype}
    assert not any(p.requires_grad for p in head.parameters())
    assert head.seen.dtype == torch.bool


@pytest.mark.parametrize("saved", [[0, 1], [0, 1, 2, 3, 4, 5], [1, 4], []], ids=str)
@pytest.mark.parametrize("into", [[], [0, 1, 2], [0, 5]], ids=str)
def test_a_state_of_another_size_brings_its_size_and_its_gaps(saved, into):
    source, target = grown(saved, seed=1), grown(into, seed=2)
    x = torch.randn(4, 6)
    result = target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert target.classes == source.classes
    assert torch.equal(target(x), source(x))
    source.grow([6]), target.grow([6])
    assert torch.equal(target(x).isfinite(), source(x).isfinite())
    assert torch.equal(target.seen, source.seen)


def test_a_state_loads_inside_a_larger_module_and_keeps_trainability():
    outer, saved = nn.ModuleDict({"a": grown([0, 1])}), nn.ModuleDict({"a": grown([0, 1, 2], seed=3)})
    outer.requires_grad_(False)
    outer.load_state_dict(saved.state_dict())
    assert torch.equal(outer["a"].weight, saved["a"].weight)
    assert not outer["a"].weight.requires_grad


def test_a_state_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        grown([0, 1]).load_state_dict(grown([0, 1, 2], features=5).state_dict())


def test_copies_are_independent():
    head = grown([0, 2])
    twin = copy.deepcopy(head)
    x = torch.randn(3, 6)
    before = head(x)
    assert torch.equal(twin(x), before)
    twin.grow([1, 5])
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(head(x), before)
    assert head.seen.tolist() == [True, False, True]


def test_functional_transforms_give_each_samples_gradient():
    head = grown([0, 2])
    x, y = torch.randn(4, 6), torch.tensor([0, 2, 2, 0])
    parameters = {name: p.detach() for name, p in head.named_parameters()}

    def loss(parameters, x, y):
        return cross_entropy(functional_call(head, parameters, (x[None],)), y[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for sample in range(4):
        head.zero_grad()
        cross_entropy(head(x[sample : sample + 1]), y[sample : sample + 1]).backward()
        torch.testing.assert_close(per_sample["weight"][sample], head.weight.grad)
