"""Top-p masks by a kernel: equal to sorting, under Triton's interpreter and on CUDA, and not used where they differ."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from clframe.nn import kernels
from clframe.sparsity import top_p
from clframe.sparsity.functional import keep

SCRIPT = """
import torch
from clframe.sparsity.functional import keep
from clframe.sparsity.top_p import launch
torch.manual_seed(0)
special = torch.tensor([[4.0, -3, 2, 1], [1, 1, 1, 1], [0, 0, 5, 0], [float("inf"), 1, 2, 0], [float("nan"), 1, 2, 3]])
cases = [torch.randn(1, 2, 7), torch.randn(1, 344).relu(), torch.zeros(1, 8), special, torch.randn(1, 70).bfloat16()]
for x in cases:
    for p in (0.0, 0.7, 0.99, 1.0):
        assert torch.equal(launch(x, p), keep(x, p, kind="top_p")), (x, p)
print("agree", launch(torch.tensor([[4.0, -3.0, 2.0, 1.0]]), 0.7).tolist())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_the_kernel_keeps_what_sorting_keeps():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "agree [[True, True, False, False]]", done.stderr[-2000:]


@pytest.fixture
def kernel(monkeypatch):
    """Function that replaces the kernel, which is then launched on a CPU too; nothing has been compared before."""
    monkeypatch.setattr(top_p, "_applies", lambda x: True)
    monkeypatch.setattr(kernels, "_agrees", {})
    return lambda function: monkeypatch.setattr(top_p, "launch", function)


def test_a_kernel_that_differs_or_fails_is_not_used(kernel, caplog):
    x = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    kernel(lambda x, p: torch.ones_like(x, dtype=torch.bool))
    for _ in range(2):
        assert keep(x, 0.7, kind="top_p").tolist() == [[True, True, False, False]]
    assert [one.getMessage()[:52] for one in caplog.records] == ["sparsity: the kernel top_p differs from sorting in 0.5"[:52]]

    def fails(x, p):
        raise RuntimeError("no compiler")

    kernels._agrees.clear()
    kernel(fails)
    assert keep(x, 0.7, kind="top_p").tolist() == [[True, True, False, False]]
    assert "does not run (no compiler)" in caplog.records[-1].getMessage()


def test_a_kernel_that_agrees_is_used(kernel):
    x, calls = torch.tensor([[4.0, -3.0, 2.0, 1.0]]), []

    def right(x, p):
        calls.append(p)
        return torch.tensor([[True, True, False, False]])

    kernel(right)
    assert keep(x, 0.7, kind="top_p").tolist() == [[True, True, False, False]] and calls == [0.7, 0.7]
    keep(x, 0.9, kind="top_p")
    assert calls == [0.7, 0.7, 0.9]  # compared once for a shape and type
    assert keep(x, 0.5, kind="max_p").tolist() == [[True, True, True, False]] and len(calls) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("neurons", [7, 344, 2048, 14336])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_masks_on_cuda_are_those_of_sorting(neurons, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, neurons, generator=generator).to(kind)
    for p in (0.0, 0.5, 0.9, 0.99, 1.0):
        found = top_p.launch(x.cuda(), p).cpu()
        assert float((found != keep(x, p, kind="top_p")).double().mean()) < 1e-4
        assert torch.equal(keep(x.cuda(), p, kind="top_p").cpu(), found)
