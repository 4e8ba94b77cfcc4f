"""The losses of prompts."""

from __future__ import annotations

import math

import torch

from clframe.nn.prompts import key_loss, mask_outside


def test_pull_longhand_and_smooth():
    similarity = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert math.isclose(float(key_loss(similarity)), (0 + 0.5 + 2 + 1 + 1 + 1) / 3)
    assert torch.autograd.gradcheck(key_loss, similarity.requires_grad_())


def test_samples_compete_with_the_classes_of_their_experience_and_replayed_ones_with_all():
    logits, y = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True), torch.tensor([2, 0])
    found = mask_outside(logits, y, outside_C=torch.tensor([True, False, False]))
    assert found.tolist() == [[-math.inf, 2.0, 3.0], [4.0, 5.0, 6.0]]
    loss = torch.nn.functional.cross_entropy(found, y)
    expected = (math.log(1 + math.exp(-1)) + math.log(math.exp(4) + math.exp(5) + math.exp(6)) - 4) / 2
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)
    loss.backward()
    assert logits.grad[0, 0] == 0 and bool(torch.isfinite(logits.grad).all()) and bool((logits.grad[1] != 0).all())
