"""The pooling kernel under Triton's interpreter, in a separate process: it is chosen when Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from clframe.exits import fused_pool
from clframe.exits.fused_pool import BlendedPool
from clframe.exits.fusion import SlicedMaxAverage, fuse_batch_norm
from clframe.exits.head_kinds import make_head
from clframe.exits.layers import MaxAveragePool
from clframe.nn import Network, kernels
from clframe.nn.backbones import small_cnn

SCRIPT = """
import torch
from torch import nn
from clframe.exits.fused_pool import BlendedPool, launch
from clframe.exits.layers import Blend, MaxAveragePool
torch.manual_seed(0)
for shape, a in (((2, 5, 6, 4), 0.3), ((1, 70, 7, 9), 0.8), ((3, 2, 13, 12), -0.7), ((1, 3, 2, 2), 1.0)):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(*shape).to(dtype, memory_format=torch.channels_last)
        pool = BlendedPool(MaxAveragePool(), Blend(), nn.Flatten())
        pool[1].a.data.fill_(a)
        with torch.no_grad():
            found, plain = launch(x, pool[1].a), pool(x)
            assert found.dtype == dtype and found.shape == plain.shape
            # PyTorch rounds maximum and average to the type before they are blended.
            tolerance = {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
            torch.testing.assert_close(found, plain, **tolerance)
            x[0, 1, 1, 0] = torch.nan
            assert torch.equal(launch(x, pool[1].a).isnan(), pool(x).isnan())
print("agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_the_kernel_agrees_with_the_operations():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.stdout == "agree\n", done.stderr[-2000:]


@pytest.fixture
def kernel(monkeypatch):
    """Function that replaces the kernel, which is then launched on a CPU too; nothing has been compared before."""
    monkeypatch.setattr(kernels, "_agrees", {})

    def use(function):
        monkeypatch.setattr(fused_pool, "_applies", lambda x: True)
        monkeypatch.setattr(fused_pool, "launch", function)

    return use


def test_a_kernel_that_differs_or_fails_is_not_used(kernel, caplog):
    head = make_head("pool", (3, 4, 4))
    assert isinstance(head.layers, BlendedPool) and list(head.layers.state_dict()) == ["1.a"]
    x = torch.randn(2, 3, 4, 4)
    plain = torch.nn.Sequential.forward(head.layers, x)
    kernel(lambda x, a: torch.zeros(len(x), 12))
    for _ in range(2):
        assert torch.equal(head.layers(x), plain)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("exits: the pooling kernel differs by ")

    def fails(x, a):
        raise RuntimeError("no compiler")

    kernels._agrees.clear()
    kernel(fails)
    assert torch.equal(head.layers(x), plain)
    assert "does not run (no compiler)" in caplog.messages[-1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_kernel_that_agrees_is_used(kernel, fused):
    """Also where the pooling has been replaced for inference."""
    net = Network(small_cnn((3, 8, 8), width=4), exits=[("block1", make_head("pool", (4, 4, 4)))])
    net.grow([0, 1])
    net = fuse_batch_norm(net, memory_format="channels_last") if fused else net.eval()
    head, calls = net.heads[0], []
    assert isinstance(head.layers[0], SlicedMaxAverage if fused else MaxAveragePool)

    def own(x, a):
        calls.append(len(x))
        return torch.nn.Sequential.forward(head.layers, x)

    x = torch.randn(2, 3, 8, 8)
    plain = net(x).logits[0]
    kernel(own)
    for _ in range(2):
        assert torch.equal(net(x).logits[0], plain)
    assert calls == [1, 2, 2]  # one map is compared, once
    x = torch.randn(2, 3, 4, 4)
    head = make_head("pool", (3, 4, 4), pooling="4x4")  # another window
    head.layers(x)
    assert len(calls) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "dtype"), [((5, 256, 56, 56), torch.float32), ((3, 70, 7, 9), torch.bfloat16)])
def test_on_a_gpu(shape, dtype):
    head = make_head("pool", shape[1:]).to("cuda", dtype)
    x = torch.randn(*shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    plain = head.layers(x)  # with gradients
    with torch.no_grad():
        found = head.layers(x)
    assert list(kernels._agrees.values())[-1] is True
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found, plain.detach(), **tolerance)
