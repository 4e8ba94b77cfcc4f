"""The Triton kernels on a GPU: every dtype, forward and backward, and inside a CUDA graph."""

import importlib.util
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.moe import DynamicK, TopK, kernel_check, to_experts, triton_router
from clframe.moe.dispatch import run_dense
from clframe.moe.executors import TENSORS, Weights, pairs_by_expert, reference
from clframe.moe.router import NormRouter
from clframe.moe.triton_experts import run_pairs, run_triton
from clframe.moe.triton_launch import list_pairs
from clframe.moe.triton_router import can_route, route_tokens
from clframe.nn import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

TOLERANCE = {"ieee": 2e-5, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference as a share of the largest entry."""

CASES = [
    # tokens, experts, neurons, inputs, outputs, gated, biased, scaled, activation
    (1, 1, 5, 7, 3, False, True, False, F.relu),
    (333, 24, 128, 768, 768, False, True, False, F.relu),
    (197, 5, 40, 36, 20, False, True, True, F.gelu),
    (70, 3, 200, 64, 136, True, True, True, F.silu),
]


@pytest.fixture(params=list(TOLERANCE))
def kind(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def make(case, dtype):
    n, e, h, d, o, gated, biased, scaled, activation = case
    generator = torch.Generator().manual_seed(n)

    def leaf(*shape):
        made = torch.randn(*shape, generator=generator).mul(2 * shape[-1] ** -0.5)
        # Exact in every dtype, so that no pre-activation changes its sign, and with it a gradient, by rounding of inputs.
        return made.bfloat16().to("cuda", dtype).requires_grad_()

    weights = Weights(
        up_EHD=leaf(e, h, d), down_EHO=leaf(e, h, o), activation=activation,
        up_bias_EH=leaf(e, h) if biased else None, gate_EHD=leaf(e, h, d) if gated else None,
        gate_bias_EH=leaf(e, h) if gated and biased else None, bias_O=leaf(o) if biased else None,
    )  # fmt: skip
    keep = (torch.rand(n, e, generator=generator) < 0.4).cuda()
    keep[0], keep[-1, 0] = False, True
    if e > 2:
        keep[:, 1] = False
    scale = torch.rand(n, e, generator=generator).to("cuda", dtype).requires_grad_() if scaled else None
    return weights, leaf(n, d), keep, scale


def exact(weights, *tensors):
    """The same values in double precision."""
    parts = (None if part is None else part.detach().double().requires_grad_() for part in weights.tensors())
    others = (None if t is None else t.detach().double().requires_grad_() for t in tensors)
    return Weights(activation=weights.activation, **dict(zip(TENSORS, parts, strict=True))), *others


def assert_near(own, want, tolerance):
    own, want = own.detach().double(), want.detach().double()
    error = (own - want).abs().max() / want.abs().max().clamp_min(1e-6)
    assert float(error) < tolerance


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}x{case[1]}x{case[2]}")
def test_forward_and_backward_agree_with_the_reference(case, kind):
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
    weights, x, keep, scale = make(case, dtype)
    weights64, x64, scale64 = exact(weights, x, scale)
    direction = torch.randn(case[0], case[4], device="cuda", dtype=dtype)
    found = []
    for executor, w, inputs, factors in ((run_triton, weights, x, scale), (reference, weights64, x64, scale64)):
        y = executor(w, inputs, keep, factors)
        leaves = [t for t in (inputs, factors, *w.tensors()) if t is not None]
        found.append((y, *torch.autograd.grad((y * direction.to(y.dtype)).sum(), leaves)))
    for own, want in zip(*found, strict=True):
        assert own.dtype == dtype
        assert_near(own, want, TOLERANCE[kind])
    with torch.no_grad():
        for fused in (False, True) if case[2] <= 128 else (False,):
            assert_near(run_pairs(weights, x, keep, scale, fused=fused), found[1][0], TOLERANCE[kind])
        assert_near(run_dense(weights, x, keep, scale), found[1][0], TOLERANCE[kind])


def test_forward_is_deterministic():
    weights, x, keep, _ = make(CASES[1], torch.bfloat16)
    with torch.no_grad():
        one = run_pairs(weights, x, keep)
        assert all(torch.equal(one, run_pairs(weights, x, keep)) for _ in range(5))


@pytest.mark.parametrize(("tokens", "experts", "width"), [(1, 3, 16), (500, 24, 128), (333, 96, 200)])
def test_router_and_lists(tokens, experts, width):
    torch.manual_seed(0)
    router, x = NormRouter(80, experts, width=width).cuda(), torch.randn(tokens, 80, device="cuda")
    for gate in (DynamicK(tau=0.0), DynamicK(tau=0.6), TopK(k=2)):
        with torch.no_grad():
            assert can_route(router, gate, x)
            keep = route_tokens(router, gate, x)
            # Sums in another order may differ in the last bits, and so may a decision near the threshold.
            assert float((keep != gate(router(x))).float().mean()) < 1e-3
    pairs = list_pairs(keep)
    expert_P, token_P = pairs_by_expert(keep)
    assert torch.equal(pairs.token_P[: len(token_P)].long(), token_P)
    assert torch.equal(pairs.end_E.long(), keep.sum(0).cumsum(0)) and torch.equal(pairs.count_N.long(), keep.sum(1))
    number_NE = torch.full(keep.shape, -1, device="cuda")
    number_NE[token_P, expert_P] = torch.arange(len(token_P), device="cuda")
    for token in range(0, tokens, 7):
        assert torch.equal(pairs.pair_NE[token, : int(pairs.count_N[token])].long(), number_NE[token][keep[token]])


@pytest.mark.parametrize("learns", [True, False])
def test_kernels_that_are_right_pass_the_comparison_of_a_first_call(kind, learns, monkeypatch, caplog):
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
    monkeypatch.setattr(kernels, "_agrees", {})
    with torch.set_grad_enabled(learns):
        for case in CASES:
            weights, x, keep, scale = make(case, dtype)
            assert all(kernel_check.kernels_agree(run, weights, x, keep, scale) for run in (run_triton, run_dense))
    torch.manual_seed(0)
    for experts, width in ((3, 16), (24, 128), (96, 200)):
        router, x = NormRouter(80, experts, width=width).to("cuda", dtype), torch.randn(70, 80).to("cuda", dtype)
        with torch.no_grad():
            assert all(triton_router.routes_agree(router, gate, x) for gate in (DynamicK(tau=0.4), TopK(k=2)))
    assert not caplog.text


def test_autocast_applies_to_experts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)))
    (layer,) = to_experts(model, experts=8, split="random").values()
    layer.cuda()
    layer.gate, layer.experts.executor = TopK(k=2), "triton"
    x = torch.randn(130, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        keep, y = layer.keep(x), layer(x)
    want = reference(layer.experts.weights(), x, keep)
    assert y.dtype == torch.bfloat16
    assert_near(y, want, TOLERANCE["bfloat16"])
    own, exact = (torch.autograd.grad(out.float().square().sum(), [x, layer.experts.up]) for out in (y, want))
    for a, b in zip(own, exact, strict=True):
        assert a.dtype == torch.float32
        assert_near(a, b, 2 * TOLERANCE["bfloat16"])


@pytest.mark.parametrize(("gate", "gradient"), list(itertools.product((DynamicK(tau=0.4), TopK(k=2)), (False, True))))
def test_a_cuda_graph_follows_new_inputs(gate, gradient):
    """The number of pairs changes with the input, the graph does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)))
    (layer,) = to_experts(model, experts=8, split="random").values()
    layer.cuda().bfloat16().requires_grad_(gradient)
    layer.gate, layer.experts.executor = gate, "triton"
    x = torch.randn(130, 64, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_(gradient)

    def step():
        y = layer(x)
        if not gradient:
            return (y,)
        return (y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.experts.parameters()]))

    with torch.set_grad_enabled(gradient):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                x.copy_(torch.randn(130, 64) * (seed + 1))
            graph.replay()
            for own, want in zip(captured, step(), strict=True):
                assert torch.equal(own, want)
