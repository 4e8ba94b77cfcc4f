"""A session's accounts on a GPU: the counts of the CPU, the device's peak, and predictions exit by exit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clframe.accounting import Ledger
from clframe.api import run
from clframe.training.cost_recorder import CostRecorder
from clframe.training.observer import StepObserver
from clframe.training.step_cost import StepProfiler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def ledger_of(folder: Path, device: str) -> Ledger:
    import json

    result = run(
        "quickstart",
        ["strategy=er + exits + early_exit(threshold=0.6)", "trainer.epochs=1", "trainer.progress=false",
         "benchmark.validation=0.1", f"trainer.accelerator={device}", "trainer.loggers=[]"],
        output=folder,
    )  # fmt: skip
    return Ledger.of(json.loads((Path(result.run_folder) / "ledger.json").read_text())["ledger"])


def test_a_run_on_a_gpu_has_the_counts_of_one_on_the_cpu(tmp_path: Path) -> None:
    on_cpu, on_gpu = ledger_of(tmp_path / "cpu", "cpu"), ledger_of(tmp_path / "gpu", "cuda")
    assert on_gpu.by_phase() == on_cpu.by_phase() and on_gpu.steps() == on_cpu.steps()
    assert on_gpu.uncounted() == {}
    assert on_gpu.predictions.parts() == on_cpu.predictions.parts()
    assert on_gpu.predictions.by_exit() == on_cpu.predictions.by_exit()
    assert on_gpu.predictions.by_role() == on_cpu.predictions.by_role()
    stopped = on_gpu.predictions.samples_by_exit()
    assert sum(stopped.values()) == sum(on_cpu.predictions.samples_by_exit().values())
    assert on_gpu.bytes()["device_peak"] > on_gpu.bytes()["parameters"]
    assert "device_peak" not in on_cpu.bytes()
    assert on_gpu.energy().energy_source in ("nvml", "none") and on_cpu.energy().energy_source in ("rapl", "none")


@pytest.mark.parametrize(
    "options",
    [
        ["strategy=er + lwf"],
        ["strategy=er + exits", "trainer.precision=16-mixed"],
        ["strategy=agem + si", "trainer.precision=bf16-mixed", "trainer.engine=trainer"],
        ["strategy=lwf", "backbone=vit_tiny", "backbone.depth=2", "backbone.patch=2"],
    ],
)  # fmt: skip
def test_counting_changes_no_bit(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(StepProfiler, "around", StepObserver.around)
            monkeypatch.setattr(CostRecorder, "_add_steps", lambda *_: None)  # updates that are skipped would be below 0
        result = run(
            "quickstart",
            ["trainer.epochs=1", "benchmark.experiences=2", "trainer.progress=false", "trainer.accelerator=cuda",
             "trainer.loggers=[]", *options],
            output=tmp_path / name,
        )  # fmt: skip
        checkpoint = sorted(Path(result.run_folder).glob("checkpoints/*.ckpt"))[-1]
        found.append(torch.load(checkpoint, weights_only=True, map_location="cpu")["network"])
    counted, plain = found
    assert counted.keys() == plain.keys() and all(torch.equal(counted[key], plain[key]) for key in counted)
