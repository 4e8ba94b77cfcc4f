"""The CUDA kernels under Triton's interpreter, in another process: it is chosen when Triton is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from clframe.nn import kernels
from clframe.sparse_decode import Rule, launch
from clframe.sparse_decode.projection import masked_hidden

SCRIPT = """
import math, sys
try:
    import triton
except Exception:
    sys.exit(77)
import torch
from torch.nn import functional as F
from clframe.moe.dense import DenseFFN
from clframe.sparse_decode import Rule, SparseFFN
from clframe.sparse_decode.launch import Tile, largest_error, run
from clframe.sparse_decode.projection import compute_masked

GELU_TANH = lambda z: F.gelu(z, approximate="tanh")
T = lambda value: Rule("threshold", value)
CASES = [
    # gated, biased, activation, rules
    (False, True, F.relu, {"intermediate": T(0.4)}),
    (False, False, F.gelu, {"input": T(0.8), "intermediate": Rule("max_p", 0.3)}),
    (True, True, F.silu, {"intermediate": T(0.3)}),
    (True, False, GELU_TANH, {"input": T(1.0)}),
    (True, True, F.silu, {"gate": T(0.4)}),
    (True, True, F.silu, {"up": Rule("top_k", 0.3)}),
    (True, False, F.relu, {"input": Rule("max_p", 0.4), "gate": T(0.2)}),
    (True, True, F.silu, {"input": T(1e3), "up": Rule("top_p", 0.8)}),
    (True, True, F.silu, {"intermediate": T(1e3)}),
]

def layer(seed, d, f, o, gated, biased, activation, rules, dtype):
    torch.manual_seed(seed)
    def linear(i, o):
        return (torch.randn(o, i) * i**-0.5).to(dtype), torch.randn(o).to(dtype) if biased else None
    return SparseFFN(DenseFFN(name="", up=linear(d, f), gate=linear(d, f) if gated else None, down=linear(f, o),
                              activation=activation, install=None), rules).eval()

small = dict(by_output=Tile(32, 32), by_input=Tile(32, 64, 4, 4))
for seed, case in enumerate(CASES):
    dtype, tolerance = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)][seed % 3 == 2]
    parts = layer(seed, 37, 75, 69, *case, dtype).parts()
    x = torch.randn(1, 37).to(dtype)
    own, want = run(parts, x, **small), compute_masked(parts, x)
    assert own.shape == want.shape and own.dtype == dtype
    error = float((own.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-9))
    assert error < tolerance, (seed, error)
    if seed == 4:
        assert largest_error(parts, x) < 1e-5

# Weights of zeros are not read: they are NaN here.
parts = layer(50, 37, 75, 69, True, False, F.silu, {"input": T(1.0), "gate": T(0.5)}, torch.float32).parts()
x = torch.randn(1, 37)
want = compute_masked(parts, x)
inputs = x[0].abs() < 1.0
gate = F.silu(parts.first(x * ~inputs))[0]
parts.first.weight[inputs] = math.nan
parts.second.weight[gate.abs() < 0.5] = math.nan
parts.down.weight[gate.abs() < 0.5] = math.nan
torch.testing.assert_close(run(parts, x, **small), want, rtol=2e-5, atol=2e-5)
print("agree", len(CASES))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_agree_with_the_masked_network():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    if done.returncode == 77:
        pytest.skip("Triton is not for this machine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agree 9\n"


@pytest.mark.parametrize("wrong", ["", "flipped", "hidden", "output", "missing", "nan"])
def test_kernels_are_compared_once_and_wrong_ones_are_not_used(make_layer, monkeypatch, caplog, wrong):
    """Three of 71 neurons on the other side of the threshold are rounding; a wrong value, or more of them, is not."""
    layer, _ = make_layer({"intermediate": Rule("threshold", 0.1)})
    calls = []

    def hidden(parts, x):
        value_F = masked_hidden(parts, x)[0]
        active_A = value_F.nonzero()[:, 0]
        value_F[active_A[: {"flipped": 3, "missing": 4}.get(wrong, 0)]] = 0
        return value_F * {"hidden": 1.03, "nan": float("nan")}.get(wrong, 1.0)

    def run(parts, x):
        calls.append(len(x))
        return parts.down(hidden(parts, x)[None]) * (1.03 if wrong == "output" else 1.0)

    right = wrong in ("", "flipped")
    monkeypatch.setattr(launch, "run_hidden", hidden)
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "triton_installed", lambda: True)
    monkeypatch.setattr(kernels, "_agrees", {})
    x = torch.randn(1, 37)
    assert [launch.kernels_work(layer.parts(), x) for _ in range(3)] == [right] * 3
    assert len(calls) <= 1 and caplog.text.count("one of the kernels differs from plain products by") == (not right)
    before = len(calls)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(kernels, "_agrees", {})
    assert launch.kernels_work(layer.parts(), x) and len(calls) == before


def test_kernels_that_do_not_run_are_not_used(make_layer, monkeypatch, caplog):
    layer, _ = make_layer({"intermediate": Rule("threshold", 0.1)})

    def broken(parts, x):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(launch, "run_hidden", broken)
    monkeypatch.setattr(launch, "triton_installed", lambda: True)
    monkeypatch.setattr(kernels, "_agrees", {})
    assert not any(launch.kernels_work(layer.parts(), torch.randn(1, 37)) for _ in range(2))
    (message,) = caplog.messages
    assert message.startswith("sparse decode: one of the kernels does not run (no compiler) on cpu; plain products are used;")


def test_what_the_kernels_cannot_do_is_multiplied_densely(make_layer, monkeypatch):
    monkeypatch.setattr(launch, "triton_installed", lambda: True)
    monkeypatch.setattr(kernels, "_agrees", {})
    rules = {"intermediate": Rule("threshold", 0.1)}
    double, _ = make_layer(rules, dtype=torch.float64)
    unknown, _ = make_layer(rules, activation=torch.tanh)
    half, _ = make_layer(rules, dtype=torch.bfloat16)
    assert not launch.kernels_work(double.parts(), torch.randn(1, 37).double())
    assert not launch.kernels_work(unknown.parts(), torch.randn(1, 37))
    assert not launch.kernels_work(half.parts(), torch.randn(1, 37))
