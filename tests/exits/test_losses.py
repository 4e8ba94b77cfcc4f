"""Weights of exits' losses and distillation from the last exit, against formulas written longhand."""

from __future__ import annotations

from math import exp, inf, log

import pytest
import torch

from clframe.errors import ConfigError
from clframe.exits.losses import exit_weights, self_distillation
from clframe.functional.losses import distillation
from clframe.nn.network import scale_gradient

PUBLISHED = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)


@pytest.mark.parametrize(
    ("kind", "first", "middle", "last"),
    [("ramp", 0.06, 1.605, 3.15), ("linear", 0.0, 1.575, 3.15), ("constant", 3.15, 3.15, 3.15)],
)
def test_sums_at_the_first_the_middle_and_the_last_epoch(kind, first, middle, last):
    sums = [sum(exit_weights(kind, PUBLISHED, epoch=epoch, epochs=201)) for epoch in (0, 100, 200)]
    assert sums == pytest.approx([first, middle, last], rel=1e-12, abs=1e-12)


def test_the_ramp_is_the_papers_formula_in_every_epoch():
    for epochs in (2, 3, 7, 200):
        for epoch in range(epochs):
            expected = [0.01 + epoch / (epochs - 1) * (w - 0.01) for w in PUBLISHED]
            assert exit_weights("ramp", PUBLISHED, epoch=epoch, epochs=epochs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["ramp", "linear", "constant"])
@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_the_last_epoch_has_the_final_weights_bit_for_bit(kind, epochs):
    assert exit_weights(kind, PUBLISHED, epoch=epochs - 1, epochs=epochs) == PUBLISHED


def test_a_plain_network_has_no_weights_of_exits():
    assert exit_weights("ramp", [], epoch=0, epochs=3) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "step"}, r"^exit weights: found 'step'; give 'ramp', 'linear' or 'constant'$"),
        ({"epoch": 3}, r"^exit weights: found epoch 3 of 3; count epochs from 0 inside the experience$"),
        ({"epoch": -1}, r"^exit weights: found epoch -1 of 3; count"),
        ({"final_weights": [0.5, -0.1]}, r"^exit weights: found -0.1; give finite numbers of at least 0$"),
        ({"final_weights": [inf]}, r"^exit weights: found inf; give finite"),
    ],
)
def test_wrong_weights_are_one_line(options, message):
    given = {"kind": "ramp", "final_weights": [0.5], "epoch": 0, "epochs": 3} | options
    with pytest.raises(ConfigError, match=message):
        exit_weights(given["kind"], given["final_weights"], epoch=given["epoch"], epochs=given["epochs"])


@pytest.mark.parametrize("factor", [0.0, 0.25, 3.0])
def test_scaling_a_gradient_leaves_the_value(factor):
    x = torch.randn(3, 2, requires_grad=True)
    y = scale_gradient(x, factor)
    assert torch.equal(x, y)
    (y**2).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() * factor)


def softmax(row, temperature):
    total = sum(exp(v / temperature) for v in row)
    return [exp(v / temperature) / total for v in row]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("exits", "batch", "classes"), [(1, 2, 3), (2, 1, 1), (2, 1, 4), (4, 3, 5)])
def test_self_distillation_longhand(exits, batch, classes, temperature):
    torch.manual_seed(0)
    logits = [torch.randn(batch, classes, dtype=torch.float64) * 2 for _ in range(exits)]
    expected = [0.0] * exits
    for k in range(exits - 1):
        for b in range(batch):
            p = softmax(logits[-1][b].tolist(), temperature)
            q = softmax(logits[k][b].tolist(), temperature)
            divergence = sum(pc * (log(pc) - log(qc)) for pc, qc in zip(p, q, strict=True))
            expected[k] += temperature**2 * divergence / batch
    assert self_distillation(logits, temperature=temperature).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_it_is_the_distillation_of_losses_with_the_last_exit_as_teacher():
    logits = list(torch.randn(4, 6, 5))
    found_K = self_distillation(logits, temperature=2.0)
    expected_K = distillation(logits[:-1], [logits[-1]] * 3, groups=[range(5)], temperature=2.0)
    torch.testing.assert_close(found_K[:-1], expected_K)


def test_the_last_exit_teaches_and_does_not_learn():
    logits = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    loss_K = self_distillation([*logits[:2], logits[2] * 1], temperature=2.0)
    assert loss_K[2] == 0
    loss_K.sum().backward()
    assert logits[2].grad is None
    assert all(logits_BC.grad.abs().sum() > 0 for logits_BC in logits[:2])
    same = torch.randn(3, 4)
    assert self_distillation([same, same], temperature=2.0).tolist() == [0.0, 0.0]


def test_classes_not_met_add_nothing_to_distillation():
    own = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    unmet = torch.tensor([False, True, False, True, False])
    loss_K = self_distillation([logits_BC.masked_fill(unmet, -inf) for logits_BC in own], temperature=2.0)
    expected_K = self_distillation([logits_BC[:, ~unmet] for logits_BC in own], temperature=2.0)
    torch.testing.assert_close(loss_K, expected_K, rtol=1e-12, atol=1e-14)
    loss_K.sum().backward()
    for logits_BC in own[:2]:
        assert logits_BC.grad.isfinite().all()
        assert (logits_BC.grad[:, unmet] == 0).all()
        assert logits_BC.grad.abs().sum() > 0


def test_distillation_under_autocast_is_in_full_precision():
    logits = list(torch.randn(3, 4, 6).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_K = self_distillation(logits, temperature=2.0)
    expected_K = self_distillation([logits_BC.float() for logits_BC in logits], temperature=2.0)
    assert found_K.dtype == torch.float32
    assert torch.equal(found_K, expected_K)
