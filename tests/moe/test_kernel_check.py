"""Kernels whose results are wrong are not used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clframe.moe import kernel_check
from clframe.moe.executors import Weights, reference
from clframe.moe.kernel_check import kernels_agree


@pytest.fixture
def case(monkeypatch):
    """Weights, tokens and a mask; nothing has been compared before."""
    monkeypatch.setattr(kernel_check, "_agrees", {})
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    up, down = nn.Parameter(draw(3, 5, 7)), nn.Parameter(draw(3, 5, 4))
    return Weights(up, down, torch.relu), draw(81, 7), torch.rand(81, 3, generator=generator) < 0.5


def test_an_executor_that_is_right_is_compared_once_for_each_use(case):
    weights, x, keep = case
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[1]))
        return reference(*arguments)

    for _ in range(3):
        assert kernels_agree(counted, weights, x, keep, None)
    assert calls == [64]
    with torch.no_grad():
        assert kernels_agree(counted, weights, x[:9], keep[:9], None)
    assert calls == [64, 9]
    assert kernels_agree(counted, weights, x, keep, torch.rand(81, 3)) and calls == [64, 9, 64]


@pytest.mark.parametrize("wrong", ["output", "missing", "nan", "gradient"])
def test_an_executor_that_is_wrong_is_refused_and_reported(case, caplog, wrong):
    weights, x, keep = case

    def bad(weights, x, keep, weight):
        right = reference(weights, x, keep, weight)
        if wrong == "output":
            return right * 1.05
        if wrong == "missing":
            return reference(weights, x, keep & (torch.arange(len(keep)) != 5)[:, None], weight)
        if wrong == "nan":
            return right + torch.where(torch.arange(len(right)) == 3, torch.nan, 0.0)[:, None]
        return right.detach() + 1.1 * (right - right.detach())

    keep[5] = True
    assert not kernels_agree(bad, weights, x, keep, None)
    assert not kernels_agree(bad, weights, x, keep, None)
    assert caplog.text.count("the kernel bad differs from plain products by") == 1
    if wrong == "gradient":
        with torch.no_grad():
            assert kernels_agree(bad, weights, x, keep, None)
