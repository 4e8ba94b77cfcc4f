"""Kernels whose results are wrong are not used."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from clframe.moe import DynamicK, TopK, dispatch, routed, to_experts, triton_router
from clframe.moe.executors import Weights, reference
from clframe.moe.kernel_check import kernels_agree
from clframe.moe.router import NormRouter
from clframe.nn import kernels


@pytest.fixture
def case(monkeypatch):
    """Weights, tokens and a mask; nothing has been compared before."""
    monkeypatch.setattr(kernels, "_agrees", {})
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
    assert len(calls) == 1
    with torch.no_grad():
        assert kernels_agree(counted, weights, x[:9], keep[:9], None)
    assert len(calls) == 2
    assert kernels_agree(counted, weights, x, keep, torch.rand(81, 3)) and calls == [300] * 3


def test_layers_with_activations_of_their_own_share_one_comparison(case):
    weights, x, keep = case
    calls, activations = [], [nn.ReLU(), nn.ReLU(), nn.SiLU(), nn.ReLU()]

    def counted(*arguments):
        calls.append(1)
        return reference(*arguments)

    for activation in activations:
        assert kernels_agree(counted, weights._replace(activation=activation), x, keep, None)
    assert len(calls) == 2  # ReLU and SiLU
    alive = [weakref.ref(activation) for activation in activations]
    del activation, activations
    assert [each() for each in alive] == [None] * 4


@pytest.mark.parametrize("tokens", [3, 200])
def test_later_tiles_of_an_expert_are_compared_however_few_tokens_there_are(case, tokens):
    """Tiles have 128 rows at most: what is wrong from the second or third one on is found."""
    weights, x, keep = case
    x, keep = x.repeat(3, 1)[:tokens], torch.zeros(tokens, 3, dtype=torch.bool)
    for wrong_from in (128, 256):

        def bad(weights, x, keep, weight, wrong_from=wrong_from):
            number_NE = keep.cumsum(0)  # of the expert's pairs
            return reference(weights, x, keep & (number_NE <= wrong_from), weight)

        assert not kernels_agree(bad, weights, x, keep, None)


def test_gradients_of_factors_are_compared(case):
    weights, x, keep = case

    def bad(weights, x, keep, weight):
        return reference(weights, x, keep, weight.detach() + 1.1 * (weight - weight.detach()))

    assert not kernels_agree(bad, weights, x, keep, torch.rand(81, 3))
    with torch.no_grad():
        assert kernels_agree(bad, weights, x, keep, torch.rand(81, 3))


def test_a_kernel_that_does_not_run_is_not_used(case, caplog, monkeypatch):
    weights, x, keep = case

    def broken(*arguments):
        raise RuntimeError("out of resource: shared memory")

    for _ in range(2):
        assert not kernels_agree(broken, weights, x, keep, None)
    monkeypatch.setattr(triton_router, "route_tokens", broken)
    for _ in range(2):
        assert not triton_router.routes_agree(NormRouter(7, 3, width=4), TopK(k=1), x)
    found = [message.partition(" on cpu")[0] for message in caplog.messages]
    reason = "does not run (out of resource: shared memory)"
    assert found == [f"experts: the kernel broken {reason}", f"experts: the kernel route {reason}"]

    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # says nothing about the kernel
        kernels_agree(full, weights, x, keep, None)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("name", ["triton", "dense"])
def test_an_executor_that_is_named_is_compared_as_one_that_is_chosen(case, monkeypatch, caplog, name):
    weights, x, keep = case
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(dispatch.EXECUTORS, name, lambda *arguments: reference(*arguments) * 2)
    x = x.as_subclass(OnCuda)
    with torch.no_grad():
        found = dispatch.run(weights, x, keep, executor=name)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), reference(weights, case[1], keep))
    assert "differs from plain products" in caplog.text


@pytest.mark.parametrize("gate", [TopK(k=2), DynamicK(tau=0.3)])
def test_a_router_kernel_that_is_wrong_is_not_used(monkeypatch, caplog, gate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)))
    (layer,) = to_experts(model, experts=4, split="random", router_width=16).values()
    layer.gate, x, calls = gate, torch.randn(50, 8), []
    expected = gate(layer.router(x))

    def use(kernel):
        monkeypatch.setattr(kernels, "_agrees", {})
        for module in (triton_router, routed):
            monkeypatch.setattr(module, "route_tokens", lambda *arguments: calls.append(1) or kernel(*arguments))
        calls.clear()

    monkeypatch.setattr(routed, "can_route", lambda *arguments: True)
    use(lambda router, gate, x: gate(router(x)))
    for _ in range(2):
        assert torch.equal(layer.keep(x), expected)
    assert len(calls) == 3 and not caplog.text  # compared once, used twice
    for wrong in (
        lambda keep: keep.roll(1, 1), lambda keep: torch.zeros_like(keep), lambda keep: torch.ones_like(keep),
        lambda keep: keep & (torch.arange(len(keep)) != 70)[:, None],
    ):  # fmt: skip
        caplog.clear()
        use(lambda router, gate, x, wrong=wrong: wrong(gate(router(x))))
        for _ in range(2):
            assert torch.equal(layer.keep(x), expected)
        assert len(calls) == 1 and caplog.text.count("the kernel route chooses other experts than the router") == 1


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


@pytest.mark.parametrize(("tokens", "outputs"), [(1, 1), (1, 4), (2, 1), (81, 1), (300, 1)])
def test_rounding_of_a_right_kernel_is_accepted_for_few_tokens_and_outputs(monkeypatch, tokens, outputs):
    """Weighted sums over repeated tokens must not cancel: nothing but rounding would be compared."""
    monkeypatch.setattr(kernels, "_agrees", {})
    generator = torch.Generator().manual_seed(tokens)
    # A smooth activation: rounding changes the sign of a pre-activation near zero, and with ReLU its gradient.
    weights = Weights(
        nn.Parameter(torch.randn(3, 5, 7, generator=generator)),
        nn.Parameter(torch.randn(3, 5, outputs, generator=generator)), nn.functional.silu,
    )  # fmt: skip
    x, keep = torch.randn(tokens, 7, generator=generator), torch.rand(tokens, 3, generator=generator) < 0.5

    def rounded(weights, x, keep, weight):
        return reference(weights, x.half().float(), keep, weight)  # as exact as TensorFloat-32

    assert kernels_agree(rounded, weights, x, keep, torch.rand(tokens, 3, generator=generator))
