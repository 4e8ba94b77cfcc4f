"""Runs of many experiences: files grow with a stated law, memory and handles do not, nor does the work of training."""

from __future__ import annotations

import cProfile
import ctypes
import gc
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clframe
from clframe.accounting import Ledger
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.metrics import Tally
from clframe.training.session import Session
from clframe.training.tensorboard import CURVES, TensorBoard

ROW_BYTES = 160
"""Bound on a row of ledger.json."""


@pytest.fixture
def many_classes():
    """A data set of as many classes as a test asks for, with few samples in each."""

    def blobs(*, n: int = 20) -> Source:
        generator = torch.Generator().manual_seed(0)
        centers_CF = 2 * torch.randn(n, 8, generator=generator)

        def draw(each: int) -> TensorSamples:
            y_N = torch.arange(n).repeat_interleave(each)
            return TensorSamples(centers_CF[y_N] + torch.randn(len(y_N), 8, generator=generator), y_N)

        return Source("many_classes", draw(4), draw(2), classes=n)

    SOURCES.register("many_classes")(blobs)
    yield
    SOURCES._entries.pop("many_classes")


def train(strategy, experiences, output, *overrides, **options):
    given = [f"strategy={strategy}", "benchmark=many_classes", f"benchmark.n={experiences}", "backbone=mlp",
             f"benchmark.experiences={experiences}", "backbone.width=16", "trainer.epochs=1", "trainer.progress=false",
             "trainer.threads=1", *overrides]  # fmt: skip
    return Path(clframe.run("quickstart", given, output=output, **options).run_folder)


def size(path):
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def rows(tree):
    """The number of rows in each table of a ledger."""
    ledger = tree["ledger"]
    tables = {name: ledger[name] for name in ("entries", "times", "bytes", "energy", "figures")} | ledger["predictions"]
    return {name: len(table) for name, table in tables.items()}


def points(folder):
    """Points by tag, without the curves of single experiences."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("experience_accuracy/")]
    return {tag: len(events.Scalars(tag)) for tag in tags}


@pytest.mark.usefixtures("many_classes")
@pytest.mark.slow
def test_every_experience_adds_the_same_rows_and_points(tmp_path):
    strategy = "er(memory=40) + exits + early_exit(threshold=0.6)"
    folders = [train(strategy, count, tmp_path / str(count), "trainer.loggers=[tensorboard]") for count in (4, 7, 10)]
    few, some, many = (rows(json.loads((folder / "ledger.json").read_text())) for folder in folders)
    assert {name: many[name] - some[name] for name in many} == {name: some[name] - few[name] for name in many}
    assert many["stops"] == 10 * 2  # exits
    found = [points(folder / "tensorboard") for folder in folders]
    assert [max(values.values()) for values in found] == [4, 7, 10]
    # Metrics of an exit may be undefined after all experiences of a short run.
    tags = [{tag for tag in values if not tag.startswith("exit_")} for values in found]
    assert tags[0] == tags[1] == tags[2]
    assert {"1_progress/accuracy", "exits_used/01_final", "loss/task/ce"} < tags[0]


def evaluations(count, *, seed):
    """Tallies of a run on ``count`` experiences of one class with 1000 samples each, all accuracies different."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        total = torch.diag(torch.full((count,), 1000))
        right = torch.diag(torch.randint(0, 1001, (count,), generator=generator))
        found.append(Tally(total.tolist(), right.tolist(), total.tolist()))
    return found


def test_event_files_are_linear_in_the_experiences(tmp_path):
    sizes = {}
    for count in (40, 80):
        tallies = evaluations(count, seed=1)
        board = TensorBoard(tmp_path / str(count), experiences=count)
        for i in range(count):
            board.evaluation(tallies[: i + 1])
            board.write_layout(i + 1)
        board.close()
        events = EventAccumulator(str(tmp_path / str(count)), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        curves = [tag for tag in events.Tags()["scalars"] if tag.startswith("experience_accuracy/")]
        assert len(curves) == CURVES
        assert len(events.Tensors("custom_scalars__config__")) == 2  # at the start, and with forgetting
        sizes[count] = size(tmp_path / str(count))
    assert sizes[80] < 2 * sizes[40]
    assert sizes[80] < 80 * 2500


def test_evaluations_take_memory_by_their_samples_not_by_experiences_times_classes():
    small, large = evaluations(40, seed=0)[0], evaluations(80, seed=0)[0]
    lengths = [len(json.dumps(tally.as_tree())) for tally in (small, large)]
    assert lengths[1] < 2.3 * lengths[0]  # 4 times as rows; positions have more digits
    assert Tally(**json.loads(json.dumps(large.as_tree()))) == large
    assert large.total_EC[79] == (0,) * 79 + (1000,)
    assert large.correct_EC.sum_by_row() == large.correct_EC.sum_by_column()


def resident():
    """Resident megabytes without what malloc has free: of that, glibc keeps up to 20 MB, another number in every run."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries of C have none
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def handles():
    """Open files, pipes and sockets, and threads."""
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.usefixtures("many_classes")
@pytest.mark.parametrize(
    ("strategy", "growth"),
    [("er(memory=600)", 1), ("er(memory=600) + exits(heads=growing)", 1), ("er(memory=600) + exits", 490 / 200)],
)
def test_five_hundred_experiences(strategy, growth, tmp_path, monkeypatch):
    """Memory within 5 % of that after the fifth experience, no handle or thread left, no growing work of training.

    With a head for each experience, that work may grow with their number.

    Every evaluation covers every 25th test experience and the newest: all 500 would take 250,000 passes over the network,
    which are known to grow with the square of the experiences.
    """
    count, memory, calls, held = 500, {}, {}, {}
    original = Session._train

    def evaluate(self):
        stream = self.benchmark.evaluation_stream
        self.strategy.eval([each for i, each in enumerate(stream) if i % 25 == 0 or i == self.progress.finished])
        return self._scores.tally

    def profiled(self, parts, index):
        if index not in (200, 490):
            return original(self, parts, index)
        with cProfile.Profile() as profile:
            seconds = original(self, parts, index)
        calls[index] = sum(entry.callcount for entry in profile.getstats())
        return seconds

    def measure(progress):
        if progress.finished in (5, 50, 250, 499, count):
            memory[progress.finished], held[progress.finished] = resident(), handles()
            print(f"{progress.finished}: {memory[progress.finished]:.1f} MB, training {progress.train_seconds:.1f} s")

    monkeypatch.setattr(Session, "_evaluate", evaluate)
    monkeypatch.setattr(Session, "_train", profiled)
    folder = train(strategy, count, tmp_path, "trainer.figures=none", on_evaluated=measure)
    print(memory, held, calls, {name: size(folder / name) for name in ("tensorboard", "ledger.json", "results.json")})
    assert max(memory.values()) < 1.05 * memory[5]
    assert set(held.values()) == {held[5]}
    assert calls[490] < 1.05 * growth * calls[200]
    tree = json.loads((folder / "ledger.json").read_text())
    assert size(folder / "ledger.json") < ROW_BYTES * sum(rows(tree).values()) + 4000
    assert sum(rows(tree).values()) < 30 * count
    assert size(folder / "tensorboard") < 10_000 * count
    assert Ledger.of(tree["ledger"]).steps() == count
