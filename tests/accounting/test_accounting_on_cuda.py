"""What only a GPU has: waiting for the device, its peak memory, its energy, and the operators that run there."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from clframe.accounting import DevicePeak, EnergyMeter, MacCounter, latency, measure_cost

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIB = 2**20


class Heavy(nn.Module):
    """Twenty products of large matrices, which take the device far longer than the host needs to ask for them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4096, 4096))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight
        for _ in range(20):
            y = y @ self.weight * 1e-2
        return x + y.sum()


def test_latency_waits_for_the_device() -> None:
    module = Heavy().cuda()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    x = torch.ones(1, 1)
    (found,) = latency(module, x, warmup=3, repeats=5)
    with torch.no_grad():
        start.record()
        module(x.cuda())
        end.record()
    torch.cuda.synchronize()
    on_device = start.elapsed_time(end) / 1e3
    assert found.device == "cuda:0" and len(found.seconds) == 5
    assert min(found.seconds) > on_device / 4  # asking alone takes a hundredth of it


def test_device_peak_is_what_was_held() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with DevicePeak("cuda") as peak:
        held = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        other = torch.zeros(32 * MIB, dtype=torch.uint8, device="cuda")
        del held, other
    assert peak.bytes == before + 96 * MIB
    with DevicePeak("cuda") as peak:
        pass
    assert peak.bytes == before


def test_energy_is_nvmls_or_none() -> None:
    module = Heavy().cuda()
    with torch.no_grad(), EnergyMeter("cuda") as meter:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            module(torch.ones(1, 1, device="cuda"))
            torch.cuda.synchronize()
    if importlib.util.find_spec("pynvml") is None:
        assert (meter.energy.joules, meter.energy.energy_source) == (None, "none")
        return
    if meter.energy.energy_source == "none":
        pytest.skip("NVML does not count energy here")
    assert meter.energy.energy_source == "nvml"
    assert meter.energy.joules is not None and 1 < meter.energy.joules < 3000  # about a second of work


def passes(module: nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    with MacCounter() as counter:
        out = module(*inputs)
        forward = counter.macs
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        assert counter.uncounted() == {}
        return forward, counter.macs - forward


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(8, 12, 3, groups=4, padding=1), (1, 8, 5, 5), 25 * 9 * 2 * 12),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 4), 2 * (3 * 2) * 9 * 1 * 6),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 3), 2 * 15 * 9 * 4 * 3),
    ],
)
def test_convolutions(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert passes(module.cuda(), torch.zeros(*shape, device="cuda", requires_grad=True)) == (macs, 2 * macs)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind: type[nn.RNNBase], gates: int) -> None:
    module = kind(3, 5, num_layers=2, bidirectional=True).cuda()  # type: ignore[call-arg]
    macs = 4 * 2 * 2 * gates * (5 * (3 + 5) + 5 * (10 + 5))
    forward, backward = passes(module, torch.randn(4, 2, 3, device="cuda", requires_grad=True))
    assert (forward, backward) == (macs, 2 * macs)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (SDPBackend.MATH, torch.float32), (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        (SDPBackend.FLASH_ATTENTION, torch.float16), (SDPBackend.CUDNN_ATTENTION, torch.float16),
    ],
)  # fmt: skip
def test_attention_is_two_products_whatever_runs_it(backend: SDPBackend, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 16, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    pair = 2 * 3 * 16 * 16 * 64
    try:
        with sdpa_kernel(backend), MacCounter() as counter:
            scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        pytest.skip(f"not on this GPU: {str(error)[:60]}")
    assert counter.macs == 2 * pair and counter.uncounted() == {}


def test_a_measure_is_the_same_on_either_device() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    x = torch.zeros(2, 3, 8, 8)
    on_cpu = measure_cost(module, x)
    on_gpu = measure_cost(module.cuda(), x)
    assert on_gpu.macs == on_cpu.macs and on_gpu.by_module() == on_cpu.by_module() and on_gpu.uncounted() == {}
