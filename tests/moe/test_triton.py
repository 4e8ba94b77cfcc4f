"""The CUDA kernels under Triton's interpreter, in a separate process: it is chosen when Triton is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.moe.executors import Weights
from clframe.moe.triton_experts import activation_code, triton_works

SCRIPT = """
import torch
from torch.nn import functional as F
from clframe.moe.executors import reference
from clframe.moe import DynamicK, TopK
from clframe.moe.executors import TENSORS, Weights
from clframe.moe.router import NormRouter
from clframe.moe.triton_experts import run_triton
from clframe.moe.triton_router import routes_agree

GELU_TANH = lambda z: F.gelu(z, approximate="tanh")
CASES = [
    # tokens, experts, neurons, inputs, outputs, gated, biased, scaled, activation
    (1, 1, 5, 7, 3, False, True, False, F.relu),
    (45, 4, 8, 36, 20, False, True, True, F.gelu),
    (9, 3, 40, 33, 35, True, True, False, F.silu),
    (40, 2, 16, 16, 16, True, False, True, GELU_TANH),
]
for seed, (n, e, h, d, o, gated, biased, scaled, activation) in enumerate(CASES):
    torch.manual_seed(seed)
    leaf = lambda *shape: torch.randn(*shape).mul(0.3).requires_grad_()
    weights = Weights(
        up_EHD=leaf(e, h, d), down_EHO=leaf(e, h, o), activation=activation,
        up_bias_EH=leaf(e, h) if biased else None, gate_EHD=leaf(e, h, d) if gated else None,
        gate_bias_EH=leaf(e, h) if gated and biased else None, bias_O=leaf(o) if biased else None,
    )
    x, keep = torch.randn(n, d, requires_grad=True), torch.rand(n, e) < 0.5
    keep[0], keep[-1, 0] = False, True
    scale = torch.rand(n, e, requires_grad=True) if scaled else None
    leaves = [t for t in (x, scale, *weights.tensors()) if t is not None]
    direction = torch.randn(n, o)
    results = []
    for executor in (run_triton, reference):
        y = executor(weights, x, keep, scale)
        results.append((y, *torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True, materialize_grads=True)))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-5, atol=2e-5)
torch.manual_seed(0)
router = NormRouter(40, 5, width=24)
for gate in (DynamicK(tau=0.4), TopK(k=2), TopK(k=9)):
    assert routes_agree(router, gate, torch.randn(70, 40))
print("agree", len(CASES))
"""


def triton_imports() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return subprocess.run([sys.executable, "-c", "import triton"], capture_output=True).returncode == 0


@pytest.mark.skipif(not triton_imports(), reason="Triton is not installed, or not for this machine")
def test_kernels_agree_with_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agree 4\n"


def test_activations_are_known_by_what_they_do():
    assert [activation_code(f) for f in (nn.ReLU(), F.gelu, nn.GELU("tanh"), nn.SiLU())] == [0, 1, 2, 3]
    assert [activation_code(f) for f in (nn.PReLU(), torch.tanh, lambda z: F.relu(z).square())] == [None] * 3


def test_what_the_kernels_cannot_do_goes_elsewhere():
    def weights(activation, dtype):
        return Weights(
            up_EHD=torch.zeros(2, 3, 4, dtype=dtype), down_EHO=torch.zeros(2, 3, 4, dtype=dtype), activation=activation
        )

    assert not triton_works(weights(F.relu, torch.float64), torch.zeros(1, 4, dtype=torch.float64))
    assert not triton_works(weights(torch.tanh, torch.float32), torch.zeros(1, 4))
    assert not triton_works(weights(F.relu, torch.float32), torch.zeros(1, 4, dtype=torch.bfloat16))
