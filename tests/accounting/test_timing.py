"""Times, memory and energy: the arithmetic of what is measured; no test asserts a time."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clframe.accounting import DevicePeak, EnergyMeter, Latency, latency, process_peak_bytes
from clframe.accounting import measurement as energy_module
from clframe.accounting.measurement import Energy, Reading, rapl
from clframe.errors import ConfigError


def test_quantiles_are_times_really_seen():
    times = Latency(batch=4, seconds=tuple(s / 100 for s in range(20, 0, -1)), device="cpu")
    assert (times.p50, times.p95) == (0.10, 0.19)
    assert times.quantile(1.0) == 0.20 and times.quantile(0.0) == 0.01
    assert times.throughput == pytest.approx(4 * 20 / 2.10)
    assert Latency(batch=1, seconds=(0.5,), device="cpu").p95 == 0.5


class Counting(nn.Module):
    """Remembers the sizes of its batches and how it was called."""

    def __init__(self):
        super().__init__()
        self.layer, self.sizes, self.modes = nn.Linear(3, 2), [], set()

    def forward(self, x):
        self.sizes.append(len(x))
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.layer(x)


def test_latency_calls_as_often_as_it_says():
    module = Counting().train()
    state = torch.get_rng_state()
    results = latency(module, torch.ones(2, 3), batches=(1, 5), warmup=2, repeats=3)
    assert module.sizes == [1] * 5 + [5] * 5 and module.modes == {(False, False)}
    assert [(r.batch, len(r.seconds), r.device) for r in results] == [(1, 3, "cpu"), (5, 3, "cpu")]
    assert all(second > 0 for r in results for second in r.seconds)
    assert module.training and torch.equal(state, torch.get_rng_state())


class Seeing(nn.Module):
    """Remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.flatten().tolist())
        return x


def test_calls_go_round_through_the_samples():
    module = Seeing()
    latency(module, torch.arange(5.0)[:, None], batches=(2,), warmup=1, repeats=4)
    assert module.seen == [[0, 1], [0, 1], [2, 3], [0, 1], [2, 3]]  # the fifth fills no batch
    module.seen.clear()
    latency(module, torch.arange(3.0)[:, None], batches=(7,), warmup=0, repeats=1)
    assert module.seen == [[0, 1, 2, 0, 1, 2, 0]]


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_nothing_to_time(wrong):
    with pytest.raises(ConfigError, match="latency: found batches"):
        latency(nn.Linear(3, 2), torch.ones(2, 3), **wrong)
    with pytest.raises(ConfigError, match="0 samples"):
        latency(nn.Linear(3, 2), torch.ones(0, 3))


def test_the_device_has_finished_before_a_clock_is_read(monkeypatch):
    """The order on a device: warm-up, wait, then for each call start, call, wait, stop."""
    from clframe.accounting import measurement as timing

    log = []
    monkeypatch.setattr(timing, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: log.append("clock") or len(log)))
    module = nn.Identity()
    module.register_forward_hook(lambda *_: log.append("call"))
    latency(module, torch.ones(1, 1), warmup=2, repeats=2)
    assert log == ["call", "call", *["wait", "clock", "call", "wait", "clock"] * 2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say")
def test_peak_memory_is_what_the_system_counts():
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert process_peak_bytes() == pytest.approx(1024 * kibibytes, rel=0.05)
    with DevicePeak("cpu") as peak:
        pass
    assert peak.bytes is None


# --- energy ----------------------------------------------------------------------------------------------------------


def write(folder, name, joules, wraps_at=1000):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{int(wraps_at * 1e6)}\n")


def test_rapl_counts_packages_and_not_their_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(energy_module, "POWERCAP", tmp_path)
    for name, joules in (("intel-rapl:0", 10), ("intel-rapl:1", 990), ("intel-rapl:0:0", 500)):
        write(tmp_path, name, joules)
    assert rapl() == {"intel-rapl:0": Reading(10.0, 1000.0), "intel-rapl:1": Reading(990.0, 1000.0)}
    with EnergyMeter("cpu") as meter:
        write(tmp_path, "intel-rapl:0", 14)
        write(tmp_path, "intel-rapl:1", 5)  # past its end and on from zero
        write(tmp_path, "intel-rapl:0:0", 900)
    assert meter.energy == Energy(4.0 + 15.0, "rapl")


def test_no_counter_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(energy_module, "POWERCAP", tmp_path)
    with EnergyMeter("cpu") as meter:
        pass
    assert meter.energy == Energy(None, "none")
    write(tmp_path, "intel-rapl:0", 1)
    with EnergyMeter("cpu") as meter:
        pass  # a counter that has not moved says nothing
    assert meter.energy == Energy(None, "rapl")
    with EnergyMeter("cpu") as meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.energy == Energy(None, "rapl")
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("words")
    assert rapl() == {}


class Nvml:
    """NVML's three calls, as the package ``nvidia-ml-py`` has them."""

    class NVMLError(Exception):
        pass

    def __init__(self, *millijoules):
        self.millijoules, self.asked = list(millijoules), []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        value = self.millijoules.pop(0)
        if value is None:
            raise self.NVMLError
        return value


@pytest.mark.parametrize(
    ("millijoules", "expected"),
    [
        ((5000, 5000, 7500), Energy(2.5, "nvml")),
        ((5000, 5000, 5000), Energy(None, "nvml")),
        ((5000, 5000, 4000), Energy(None, "nvml")),
        ((5000, 5000, None), Energy(None, "nvml")),
        ((None,), Energy(None, "none")),
    ],
)
def test_nvml(millijoules, expected, monkeypatch):
    nvml = Nvml(*millijoules)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with EnergyMeter("cuda:0") as meter:
        pass
    assert meter.energy == expected and nvml.asked == ["GPU-abc"]


def test_a_gpu_without_nvml_is_not_measured_by_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(energy_module, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    write(tmp_path, "intel-rapl:0", 1)
    with EnergyMeter("cuda") as meter:
        write(tmp_path, "intel-rapl:0", 5)
    assert meter.energy == Energy(None, "none")
