"""Timing a run: every way to predict, MACs that were counted while it ran, and one line for what cannot be."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from recorded_graphs import RecordedGraphs

from clframe import load, run
from clframe.data import digits
from clframe.errors import ConfigError, RunFolderError
from clframe.exits import measured
from clframe.exits.captured import CapturedNetwork
from clframe.exits.measured import MeasuredNetwork
from clframe.report.latency import read_timings
from clframe.targets import rules
from clframe.targets.latency import time_run
from clframe.targets.opening import open_target

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with exits and a policy."""
    result = run(
        "quickstart",
        ["strategy=er + exits + early_exit(threshold=0.6)", "backbone=mlp", "trainer.epochs=1", "trainer.loggers=[]",
         "trainer.progress=false", "benchmark.validation=0.1"],
        output=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip
    return Path(result.run_folder)


def test_every_way_with_every_size(folder: Path) -> None:
    timings = time_run(folder, batches=(1, 7), warmup=0, repeats=2)
    assert read_timings(folder) == timings and timings.batches == (1, 7)
    network = load(folder).network
    ways = ["whole network", *(f"exit/{name}" for name in network.exit_names), "policy"]
    assert [(row.way, row.batch) for row in timings.rows] == [(way, size) for way in ways for size in (1, 7)]
    assert all(0 < row.p50 <= row.p95 and row.throughput > 0 for row in timings.rows)
    costs = json.loads((folder / "ledger.json").read_text())
    macs = {(row.way, row.batch): row.macs for row in timings.rows}
    assert macs["whole network", 1] == macs["whole network", 7] == costs["exit_macs"]["final"]
    stages, heads, spent = costs["inference_macs"], {}, 0
    for name, count in stages.items():
        if name.startswith("exit/"):
            heads[name] = spent + count
        else:
            spent += count
    for way, count in heads.items():  # no exit before it is computed
        assert macs[way, 1] == macs[way, 7] == count
    # The same samples for every size: 256 are no multiple of 7.
    assert min(heads.values()) < macs["policy", 1] == macs["policy", 7] < costs["exit_macs"]["final"]
    assert timings.setting.samples == 256 and timings.setting.device == "cpu"


def test_the_policys_macs_are_those_of_who_stops_where(folder: Path) -> None:
    """Of single samples, a table of costs times counts."""
    timings = time_run(folder, batches=(1,), warmup=0, repeats=1)
    trained = load(folder)
    x = torch.cat([batch.inputs for batch in open_target(str(folder)).batches("test", limit=256)])  # type: ignore[misc]
    _, exit_B = trained.dynamic()(x)
    cost = json.loads((folder / "ledger.json").read_text())["exit_macs"]
    names = trained.network.exit_names
    expected = sum(cost[names[exit]] for exit in exit_B.tolist()) / len(x)
    assert timings.rows[-1].way == "policy" and timings.rows[-1].macs == pytest.approx(expected)


def test_timed_calls_see_samples_of_all_experiences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first samples are not all of the first experience, as the test data are in the order of experiences."""
    seen: list[torch.Tensor] = []

    def note(module: torch.nn.Module, x: torch.Tensor, **options: object) -> tuple[()]:
        seen.append(x)
        return ()

    monkeypatch.setattr("clframe.targets.latency.latency", note)
    time_run(folder, batches=(1,))
    target = open_target(str(folder))
    rows = [torch.cat([batch.inputs for batch in part.batches()]) for part in target.experiences]  # type: ignore[misc]
    brought = {i for i, part in enumerate(rows) for x in seen[0][:32] if bool((part == x).flatten(1).all(1).any())}
    assert brought == set(range(len(rows))) and len(rows) > 1
    assert all(torch.equal(x, seen[0]) for x in seen)


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"repeats": 0}, {"warmup": -1}])
def test_nothing_to_time_is_refused(wrong: dict[str, object], folder: Path) -> None:
    with pytest.raises(ConfigError, match="latency: found batches"):
        time_run(folder, **wrong)  # type: ignore[arg-type]


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"contains no config\.yaml; give a run folder"):
        time_run(tmp_path)


def graphs_on_a_cpu(dynamic, batch):
    return CapturedNetwork(dynamic, batch=batch, graphs=RecordedGraphs())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_predictions_by_graphs_are_those_without(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = graphs_on_a_cpu if device == "cpu" else None
    monkeypatch.setattr(rules, "_can_record", lambda network: True)
    monkeypatch.setattr(rules, "MeasuredNetwork", partial(MeasuredNetwork, after=0.0, make=make))
    monkeypatch.setattr(measured, "time_call", lambda call, _: (call(), float(not isinstance(call.func, CapturedNetwork))))
    model, x = load(folder, device=device), digits().test.x[:70]
    plain, graphs = (model.predict(x, batch_size=32, graphs=wanted) for wanted in (False, True))
    assert [row.exit for row in graphs.rows] == [row.exit for row in plain.rows]
    assert [row.macs for row in graphs.rows] == [row.macs for row in plain.rows]
    assert graphs.class_ids == plain.class_ids and len({row.exit for row in plain.rows}) > 1
    assert plain.notes == ()
    assert [note.partition(":")[0] for note in graphs.notes] == ["CUDA graphs"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(folder: Path) -> None:
    timings = time_run(folder, batches=(1, 32), device="cuda", repeats=5)
    assert timings.setting.device.startswith("cuda:0 (")
    on_cpu = time_run(folder, batches=(1, 32), repeats=1)
    by_graphs = [("policy, CUDA graphs", size) for size in (1, 32)]
    assert [(row.way, row.batch) for row in timings.rows] == [(row.way, row.batch) for row in on_cpu.rows] + by_graphs
    assert [row.macs for row in timings.rows if "policy" not in row.way] == [
        row.macs for row in on_cpu.rows if row.way != "policy"
    ]
