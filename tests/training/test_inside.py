"""Checkpoints inside an experience: when they are written, what they hold, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from power_cuts import TINY, assert_same_run, without_pictures

import clframe
from clframe.config.periods import Period
from clframe.core import COMPONENTS, Component
from clframe.data.augmentation import AUGMENTATIONS
from clframe.data.epoch_loader import EpochLoader
from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.errors import RunFolderError
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.training.checkpoint import decode, encode, inside_files, load_inside, remove_inside, save_inside
from clframe.training.inside import MOST_COST, Position, Schedule
from clframe.training.monitor import Monitor

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def fast():
    patch = without_pictures()
    yield
    patch.undo()


def killed_run(options: list[str], output: Path, *, step: int) -> Path:
    """The folder of a run that was killed after this many steps."""
    original, count = Monitor.on_step, iter(range(1, 10_000))

    def on_step(self: Monitor, strategy: Any) -> None:
        original(self, strategy)
        if next(count) == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "on_step", on_step)
        with pytest.raises(Killed):
            clframe.run("quickstart", options, output=output)
    (path,) = output.glob("quickstart/*")
    return path


# --- when -----------------------------------------------------------------------------------------


def test_a_period_in_steps():
    schedule = Schedule(Period(steps=10))
    schedule.begin(100)
    assert [s for s in range(100, 125) if schedule.is_due("step", s)] == list(range(110, 125))
    schedule.add(110, seconds=1e9)  # whatever it costs: the period was asked for
    assert not schedule.is_due("step", 119) and schedule.is_due("step", 120)
    assert schedule.is_due("epoch", 111) and schedule.is_due("trained", 111)
    assert not schedule.is_due("epoch", 110)  # nothing has changed since
    assert not schedule.is_due("begin", 500)


def test_a_period_in_time():
    now = 0.0
    schedule = Schedule(Period(seconds=60), clock=lambda: now)
    schedule.begin(0)
    due = []
    for now in (5.9, 6.1, 59.9, 60.1):  # noqa: B007  # read by the clock
        due.append((schedule.is_due("step", 1), schedule.is_due("epoch", 1)))
    assert due == [(False, False), (False, True), (False, True), (True, True)]


def test_a_period_in_time_costs_at_most_its_share():
    """Writing takes 3 s: by the third checkpoint at 60 s each it would be 5 % of the time."""
    now = 0.0
    schedule = Schedule(Period(seconds=60), clock=lambda: now)
    schedule.begin(0)
    spent, step = 0.0, 0
    while now < 3600:
        now, step = now + 1, step + 1
        if schedule.is_due("step", step) or (step % 7 == 0 and schedule.is_due("epoch", step)):
            now, spent = now + 3, spent + 3
            schedule.add(step, seconds=3)
    assert 0 < spent / now <= MOST_COST + 3 / 3600


def test_no_period_writes_none():
    assert not Schedule(None).is_due("step", 10**9)


def test_positions_count_from_one_in_text():
    at = Position(experience=1, part=0, epoch=2, batch=17, step=140, trained=False)
    assert str(at) == "experience 2, epoch 3, step 140"
    assert Position.of(asdict(at)) == at
    for change in ({"epoch": -1}, {"batch": True}, {"trained": 1}, {"step": 1.5}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Position.of({**asdict(at), **change})
    with pytest.raises(TypeError):
        Position.of({"experience": 1})


# --- what -----------------------------------------------------------------------------------------


def test_references_to_live_parameters_come_back_as_such():
    network, other = (Network(mlp((1, 2, 2), width=3)) for _ in range(2))
    live = {id(p): name for name, p in network.named_parameters()}
    first = next(network.parameters())
    state = {"live": [first], "copy": first.detach().clone(), "names": (("a", (1, 2)),)}
    found = decode(encode(state, live=live), other)
    assert found["live"][0] is next(other.parameters())
    assert torch.equal(found["copy"], first) and found["names"] == (("a", (1, 2)),)
    assert torch.equal(encode(state)["live"][0], first)  # between experiences: a value


@pytest.mark.parametrize("options", [{}, {"join_single": True}, {"drop_last": True}])
@pytest.mark.parametrize("kind", ["memory", "augmented", "lazy"])
def test_a_loader_skips_batches_without_reading_them(kind, options):
    x, y = torch.arange(33 * 16, dtype=torch.uint8).reshape(33, 1, 4, 4), torch.arange(33)
    augment = () if kind == "memory" else AUGMENTATIONS.get("crop")
    if kind == "lazy":
        samples: Any = DatasetSamples.of(x, y, augment=augment, num_workers=0)
    else:
        samples = TensorSamples(x, y, augment=augment)
    loader = EpochLoader(samples, 8, shuffle=True, seed=3, experience=1, **options)
    loader.epoch = 2
    batches, states, indices = [], [], []
    for number, batch in enumerate(loader):
        batches.append(batch)
        states.append(loader.augmentation_state())
        indices.append(loader.stored(number, len(batch[1])))
    assert len(batches) == len(loader)
    for skipped in range(1, len(batches)):
        again = EpochLoader(samples, 8, shuffle=True, seed=3, experience=1, **options)
        again.epoch = 2
        again.skip(skipped, states[skipped - 1])
        left = list(again)
        assert len(left) == len(batches) - skipped
        for number, (found, expected) in enumerate(zip(left, batches[skipped:], strict=True), start=skipped):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert torch.equal(again.stored(number, len(found[1])), indices[number])
        assert len(list(again)) == len(batches)  # only once


def test_the_last_two_of_an_experience_stay(tmp_path):
    for step in (5, 999_999, 1_000_000):
        save_inside(tmp_path, {"value": step}, finished=1, step=step)
    save_inside(tmp_path, {"value": 7}, finished=2, step=7)
    assert [p.name for p in inside_files(tmp_path, finished=1)] == [
        "inside_002_step_999999.ckpt", "inside_002_step_1000000.ckpt"
    ]  # fmt: skip
    assert load_inside(tmp_path, finished=1, device=CPU)["value"] == 1_000_000
    remove_inside(tmp_path, finished=2)
    assert [p.name for p in tmp_path.iterdir()] == ["inside_003_step_000007.ckpt"]
    assert load_inside(tmp_path, finished=1, device=CPU) is None


def test_a_newer_format_is_refused(tmp_path):
    torch.save({"format": 4, "finished": 0}, tmp_path / "inside_001_step_000007.ckpt")
    with pytest.raises(RunFolderError, match=r"has format 4, this version reads 2 and 3; use the version that wrote"):
        load_inside(tmp_path, finished=0, device=CPU)


# --- in runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run killed in its second experience, with two checkpoints inside it."""
    options = [*TINY, "strategy=er(memory=20) + lwf"]
    return killed_run(options, tmp_path_factory.mktemp("killed"), step=18 + 14)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("killed")
    return Path(str(clframe.run("quickstart", [*TINY, "strategy=er(memory=20) + lwf"], output=output).run_folder))


@pytest.fixture
def folder(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_the_log_names_the_position(folder, caplog):
    names = [path.name for path in inside_files(folder / "checkpoints", finished=1)]
    assert names == ["inside_002_step_000009.ckpt", "inside_002_step_000013.ckpt"]
    with caplog.at_level("INFO", logger="clframe"):
        clframe.run(resume=folder)
    assert "resumed at experience 2, epoch 2, step 13" in caplog.messages
    assert "resumed at experience 2, epoch 2, step 13" in (folder / "log.txt").read_text()


def test_a_damaged_one_is_skipped(folder, whole, caplog):
    newest = inside_files(folder / "checkpoints", finished=1)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level("INFO", logger="clframe"):
        clframe.run(resume=folder)
    assert f"{newest}: is damaged or no checkpoint of clframe; the one before it is used" in caplog.messages
    assert "resumed at experience 2, epoch 2, step 9" in caplog.messages
    assert_same_run(whole, folder)


def test_a_folder_of_format_2_resumes(folder, whole):
    """As versions before checkpoints inside experiences have written it."""
    for path in inside_files(folder / "checkpoints", finished=1):
        path.unlink()
    (path,) = (folder / "checkpoints").iterdir()
    content = torch.load(path, weights_only=True)
    del content["precision"]
    config = content["config"].replace("  checkpoint:\n    every: 4\n", "")
    assert config != content["config"]
    torch.save({**content, "format": 2, "config": config}, path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  checkpoint:\n    every: 4\n", ""))
    assert clframe.run(resume=folder).final_average_accuracy == clframe.run(resume=whole).final_average_accuracy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "seed: 3"}, "was written by another config"),
        ({"position": {"experience": 1}}, r"inside_002_step_000013\.ckpt: does not fit this run \(.*missing"),
        ({"steps": 3}, r"does not fit this run \(steps=3\)"),
        ({"finished": 0}, r"finished=0 contradicts the file's name"),
        ({"strategy": {}}, r"does not fit this run \('network'\); delete it to resume from the checkpoint before"),
        ({"ledger": {}}, r"does not fit this run \(ledger: has schema None"),
    ],
)
def test_content_that_does_not_fit_is_refused(folder, change, message):
    path = inside_files(folder / "checkpoints", finished=1)[-1]
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(RunFolderError, match=message):
        clframe.run(resume=folder)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(folder, whole, monkeypatch):
    import errno
    import os

    write, calls = os.write, []

    def full(handle: int, data: Any) -> int:
        calls.append(len(data))
        if len(data) > 10_000:  # a checkpoint, not the lock
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFolderError, match=r"inside_002_step_000017\.ckpt: cannot be written \(No space left"):
        clframe.run(resume=folder)
    monkeypatch.undo()
    names = [path.name for path in inside_files(folder / "checkpoints", finished=1)]
    assert names == ["inside_002_step_000009.ckpt", "inside_002_step_000013.ckpt"]
    clframe.run(resume=folder)
    assert_same_run(whole, folder)


def test_plugins_are_named_before_training(tmp_path, caplog):
    options = [*TINY, "trainer.epochs=1", "components.avalanche.plugins=[LwFPlugin]"]
    with caplog.at_level("INFO", logger="clframe.training.saver"):
        folder = clframe.run("quickstart", options, output=tmp_path).run_folder
    assert caplog.messages == ["trainer.checkpoint: none inside experiences, as checkpoints lack the state of LwFPlugin"]
    assert not list(Path(str(folder)).glob("checkpoints/inside*"))


def test_a_state_that_no_checkpoint_can_hold_is_reported_and_does_not_end_the_run(tmp_path, caplog):
    @dataclass(frozen=True, kw_only=True)
    class Odd(Component):
        """Holds a function while it trains."""

        name: ClassVar[str] = "odd"

        def before_experience(self, network: Any, context: Any, state: Any) -> Any:
            return {"call": print}

        def after_experience(self, network: Any, context: Any, state: Any) -> Any:
            return {}

    with pytest.MonkeyPatch.context() as patch:
        COMPONENTS.names()  # finds the others
        patch.setitem(COMPONENTS._entries, "odd", Odd)
        with caplog.at_level("WARNING", logger="clframe.training.saver"):
            folder = clframe.run("quickstart", [*TINY, "trainer.epochs=1", "strategy=odd"], output=tmp_path).run_folder
    assert len(caplog.messages) == 1 and "component 'odd'" in caplog.messages[0]
    assert "builtin_function_or_method" in caplog.messages[0]
    assert len(list(Path(str(folder)).glob("checkpoints/*"))) == 2
