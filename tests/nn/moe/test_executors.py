"""Every executor against the definition, forwards and backwards."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from clframe.nn.moe.execute import EXECUTORS, Plan, run
from clframe.nn.moe.executors import reference
from clframe.nn.moe.grouped_product import grouped_mm_works
from clframe.nn.moe.weights import Weights

FAST = ("dense", "views", "grouped", "grouped_mm")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def make(e=4, h=8, d=16, o=12, *, gated=False, biased=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()

    return Weights(
        up_EHD=leaf(e, h, d),
        down_EHO=leaf(e, h, o),
        activation=F.gelu if gated else F.relu,
        up_bias_EH=leaf(e, h) if biased else None,
        gate_EHD=leaf(e, h, d) if gated else None,
        gate_bias_EH=leaf(e, h) if gated and biased else None,
        bias_O=leaf(o) if biased else None,
    )


def routing(n, e, kind="random"):
    keep = torch.rand(n, e) < 0.4
    if kind == "empty experts":
        keep[:, ::2] = False
        keep[:, -1] = True
    elif kind == "none":
        keep[:] = False
    elif kind == "all":
        keep[:] = True
    return keep


def longhand(weights, x, keep, weight=None):
    """The sum over (token, expert) pairs, one by one."""
    rows = []
    for n in range(len(x)):
        y = torch.zeros(weights.down_EHO.shape[2], dtype=x.dtype) if weights.bias_O is None else weights.bias_O
        for e in range(len(weights.up_EHD)):
            if keep[n, e]:
                up = weights.up_EHD[e] @ x[n] + (0 if weights.up_bias_EH is None else weights.up_bias_EH[e])
                if weights.gate_EHD is None:
                    hidden = weights.activation(up)
                else:
                    bias = 0 if weights.gate_bias_EH is None else weights.gate_bias_EH[e]
                    hidden = up * weights.activation(weights.gate_EHD[e] @ x[n] + bias)
                y = y + (hidden @ weights.down_EHO[e]) * (1 if weight is None else weight[n, e])
        rows.append(y)
    return torch.stack(rows)


def close(a, b, tolerance):
    assert (a is None) == (b is None)
    if a is not None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(executor, weights, x, keep, weight, direction):
    leaves = [x, weight, *weights.parts()]
    leaves = [leaf for leaf in leaves if leaf is not None]
    y = executor(weights, x, keep, weight)
    return y, torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True, materialize_grads=True)


def usable(name, weights, x):
    return name != "grouped_mm" or grouped_mm_works(weights, x)


@pytest.mark.parametrize(("gated", "biased", "scaled"), list(itertools.product((False, True), repeat=3)))
def test_reference_is_the_sum_over_pairs(gated, biased, scaled):
    weights = make(3, 5, 7, 2, gated=gated, biased=biased)
    x, keep = torch.randn(6, 7, dtype=torch.float64), routing(6, 3)
    scale = torch.rand(6, 3, dtype=torch.float64) if scaled else None
    close(reference(weights, x, keep, scale), longhand(weights, x, keep, scale), 1e-12)


@pytest.mark.parametrize("kind", ["random", "empty experts", "none", "all"])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agree_with_the_reference_and_its_gradients(name, gated, biased, kind, dtype):
    for seed, (n, e, h, d, o, scaled) in enumerate(
        [(1, 4, 8, 16, 8, False), (9, 5, 8, 24, 16, True), (7, 1, 8, 8, 8, False), (3, 6, 3, 5, 7, True)]
    ):
        weights = make(e, h, d, o, gated=gated, biased=biased, dtype=dtype, seed=seed)
        x = torch.randn(n, d, dtype=torch.float64).to(dtype).requires_grad_()
        keep = routing(n, e, kind)
        scale = torch.rand(n, e, dtype=torch.float64).to(dtype).requires_grad_() if scaled else None
        direction = torch.randn(n, o, dtype=torch.float64).to(dtype)
        if not usable(name, weights, x):
            continue
        # In half precision both are compared with the same computed in double precision.
        exact = Weights(
            activation=weights.activation,
            **{
                key: None if part is None else part.detach().double().requires_grad_()
                for key, part in zip(
                    ("up_EHD", "down_EHO", "up_bias_EH", "gate_EHD", "gate_bias_EH", "bias_O"), weights.parts(), strict=True
                )
            },
        )
        scale64 = None if scale is None else scale.detach().double().requires_grad_()
        y, grads = gradients(EXECUTORS[name], weights, x, keep, scale, direction)
        expected, wanted = gradients(
            reference, exact, x.detach().double().requires_grad_(), keep, scale64, direction.double()
        )
        assert y.dtype == dtype
        close(y.double(), expected, TOLERANCE[dtype])
        for own, other in zip(grads, wanted, strict=True):
            close(own.double(), other, TOLERANCE[dtype] * max(1.0, float(other.abs().max())))
        with torch.no_grad():  # other code may run without gradients
            close(EXECUTORS[name](weights, x, keep, scale).double(), expected, TOLERANCE[dtype])


def test_grouped_mm_takes_the_sizes_it_can_and_no_others():
    x = torch.randn(2, 16)
    float32 = make(2, 8, 16, 12, dtype=torch.float32)
    odd = make(2, 7, 16, 12, dtype=torch.float32)
    assert not grouped_mm_works(odd, x) and not grouped_mm_works(make(2, 8, 16, 12), x.double())
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped product on the CPU")
    assert grouped_mm_works(float32, x)


def test_double_precision_gradients_by_finite_differences():
    weights = make(3, 2, 4, 3, gated=True)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for name in ("dense", "views", "grouped"):
        assert torch.autograd.gradcheck(lambda x, name=name: EXECUTORS[name](weights, x, keep, None), (x,))


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.2), (1, 1.0), (5, 0.3), (5, 0.95), (40, 0.3)])
def test_the_choice_changes_nothing(n, fraction):
    weights = make(6, 8, 16, 8, dtype=torch.float32)
    x, keep = torch.randn(n, 16), torch.rand(n, 6) < fraction
    chosen = run(weights, x, keep, plan=Plan(few=2, many=20, overhead=2.0))
    close(chosen, reference(weights, x, keep), 2e-5)


def test_which_executor_is_chosen(monkeypatch):
    from clframe.nn.moe import execute

    seen = []
    for name in ("dense", "grouped", "grouped_mm", "token_by_token"):
        original = getattr(execute, name)
        monkeypatch.setattr(
            execute, name, lambda *args, name=name, f=original, **kw: (seen.append(name), f(*args, **kw))[1]
        )
    monkeypatch.setattr(execute, "grouped_mm_works", lambda weights, x: True)
    weights = make(4, 8, 16, 8, dtype=torch.float32)
    one = torch.zeros(1, 4, dtype=torch.bool)
    one[:, 2] = True
    plan = Plan(few=1, many=8, overhead=8.0, overhead_few=8.0)
    for n, keep in ((1, one), (3, one.expand(3, 4)), (8, one.expand(8, 4)), (3, ~one.expand(3, 4)), (2, None), (1, ~one)):
        run(weights, torch.randn(n, 16), keep, plan=plan)
    assert seen == ["token_by_token", "grouped_mm", "grouped", "dense", "dense", "dense"]


def test_no_tokens():
    weights = make(4, 8, 16, 12, dtype=torch.float32)
    y = run(weights, torch.randn(0, 16), torch.zeros(0, 4, dtype=torch.bool))
    assert y.shape == (0, 12)
    y.sum().backward()
    assert float(weights.up_EHD.grad.abs().sum()) == 0
