"""Extensions of runs: a chain equals one run over the same stream; what is matched, refused and reported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from extended_runs import (
    assert_same_run,
    digits_part_registered,
    fields,
    more,
    part_of_digits,
    same,
    train,
    train_parent,
)

import clframe
from clframe.api import extend
from clframe.data import digits
from clframe.errors import DataError
from clframe.results import Result


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with digits_part_registered():
        yield


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def child(parent: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return extend(parent.run_folder, more(4, 5), output=tmp_path_factory.mktemp("child"))


STRATEGIES = {
    "er + lwf + exits": ["backbone.depth=3"],
    "ewc": [],
    "er + sparsity": [],
    "er + moe": ["components.moe.experts=4"],
    "er + exits + icarl": ["benchmark.validation=0.2"],
}


def compare_chain(tmp_path: Path, strategy: str, overrides: Sequence[str], *, start: int, count: int) -> None:
    given = [f"strategy={strategy}", *overrides]
    counts = [start, *[1] * count]
    whole = train(tmp_path / "whole", *given, f"benchmark.classes={sum(counts)}", f"benchmark.counts={counts}")
    chain = train(tmp_path / "chain", *given, f"benchmark.classes={start}", "benchmark.experiences=1")
    for c in range(start, start + count):
        chain = extend(chain.run_folder, more(c))
    assert len(chain.accuracy_matrix) == count + 1
    assert_same_run(chain, whole)


@pytest.mark.parametrize("strategy", [pytest.param("er + lwf + exits", marks=pytest.mark.slow), "ewc"])
def test_three_extensions_equal_one_run(tmp_path: Path, strategy: str) -> None:
    compare_chain(tmp_path, strategy, STRATEGIES[strategy], start=2, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nine_extensions_equal_one_run(tmp_path: Path, strategy: str) -> None:
    compare_chain(tmp_path, strategy, STRATEGIES[strategy], start=1, count=9)


def test_a_config_of_an_extended_run_describes_the_whole_stream(tmp_path: Path, child: Result) -> None:
    # Trained from its config alone, without the checkpoint of its parent, a run ends with the same weights.
    again = clframe.run(str(Path(child.run_folder) / "config.yaml"), output=tmp_path)
    assert_same_run(again, child)


def test_online_streams_go_on(tmp_path: Path) -> None:
    online = ["strategy=er", "benchmark.online=32"]
    whole = train(tmp_path / "whole", *online, "benchmark.classes=4", "benchmark.counts=[2, 2]")
    chain = train(tmp_path / "chain", *online, "benchmark.classes=2", "benchmark.experiences=1")
    assert_same_run(extend(chain.run_folder, more(2, 3)), whole)


def test_an_interrupted_extension_resumes_to_the_same_bits(tmp_path: Path, parent: Result) -> None:
    new = [*more(4, 5), "benchmark.experiences=2"]
    whole = extend(parent.run_folder, new, output=tmp_path / "whole")

    def stop(progress: Any) -> None:
        if progress.finished == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        extend(parent.run_folder, new, output=tmp_path / "killed", on_evaluated=stop)
    assert_same_run(clframe.run(resume=stopped.value.folder), whole)  # type: ignore[attr-defined]


def test_the_parent_is_named_and_unchanged(parent: Result, child: Result) -> None:
    import hashlib

    folder = Path(parent.run_folder)
    (entry,) = clframe.load(child.run_folder).config.earlier
    checkpoint = folder / "checkpoints" / entry.checkpoint
    assert Path(entry.run) == folder.resolve()
    assert entry.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert entry.experiences == ((0, 1), (2, 3))
    assert entry.class_names == ("0", "1", "2", "3")
    assert Result.from_json(folder / "results.json").to_json() == parent.to_json()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["experience_001.ckpt", "experience_002.ckpt"]


def test_the_matrix_covers_old_and_new_experiences(parent: Result, child: Result) -> None:
    assert child.experiences == ((0, 1), (2, 3), (4, 5))
    assert [row[:2] for row in child.accuracy_matrix[:2]] == [*parent.accuracy_matrix]
    assert [row[2] for row in child.accuracy_matrix[:2]] == [0.0, 0.0]  # classes without a column are never right
    assert child.test_samples[:2] == parent.test_samples
    assert child.steps > parent.steps and child.class_names == ("0", "1", "2", "3", "4", "5")


def test_report_latency_and_targets_read_an_extended_run(child: Result) -> None:
    from clframe.report.loading import load_run
    from clframe.targets import open_target
    from clframe.targets.latency import time_run

    folder = Path(child.run_folder)
    assert load_run(folder).experiences == 3
    assert "extends" in load_run(folder).settings
    assert len(open_target(str(folder)).experiences) == 3
    assert time_run(folder, batches=(1,), repeats=2, warmup=0).rows
    model, test = clframe.load(folder), digits().test
    known = (test.y < 6).nonzero().flatten()
    accuracy = float((model.classify(test.x[known]) == test.y[known]).double().mean())
    assert accuracy == pytest.approx(child.final_weighted_accuracy)


def test_a_model_extends_itself(tmp_path: Path, parent: Result, child: Result) -> None:
    # Data in memory: the same source object gives the same weights as its registered name.
    result = clframe.load(parent.run_folder).extend(part_of_digits(only=(4, 5)), output=tmp_path)
    assert same(clframe.load(result.run_folder).network, clframe.load(child.run_folder).network)


def test_a_benchmark_in_memory_keeps_its_experiences(tmp_path: Path, parent: Result) -> None:
    benchmark = clframe.class_incremental(part_of_digits(only=(4, 5, 6)), experiences=2, order=[2, 0, 1])
    result = extend(parent.run_folder, benchmark, output=tmp_path)
    assert result.experiences[2:] == ((6, 4), (5,))
    assert result.class_names[4:] == ("4", "5", "6")


def test_known_classes_get_more_samples(tmp_path: Path, parent: Result) -> None:
    planned: list[Any] = []
    result = extend(parent.run_folder, more(1, 7), output=tmp_path, on_planned=planned.append)
    assert (planned[0].known, planned[0].new) == (("1",), ("7",))
    assert result.experiences[2] == (1, 4) and result.class_names[4] == "7"
    assert len(clframe.load(result.run_folder).class_order) == 5
    # Before the extension the model knew class 1: accuracy on the new test data then was not evaluated, and is not 0.
    assert all(math.isnan(row[2]) for row in result.accuracy_matrix[:2])
    assert "forward_transfer" in result.undefined and not math.isnan(result.final_average_accuracy)


@pytest.fixture(scope="module")
def movable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("movable")
    (here := folder / "data").touch()
    base = ["strategy=er + exits", "backbone.depth=3", "benchmark=digits_part", "benchmark.only=[0, 1]"]
    return train(folder, *base, f"benchmark.available={here}", "benchmark.experiences=1"), here


def test_missing_data_are_not_evaluated(
    tmp_path: Path, movable: tuple[Result, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run, here = movable
    new = more(2)
    whole = extend(run.run_folder, new, output=tmp_path / "whole")
    here.rename(here.with_name("moved"))
    try:
        result = extend(run.run_folder, new, output=tmp_path / "gone")
        again = extend(result.run_folder, more(3), output=tmp_path / "gone")
    finally:
        here.with_name("moved").rename(here)
    assert f"earlier data: {here}: no such folder; restore it; its experience is not evaluated" in caplog.text
    # Training does not need them: the weights are the same.
    assert same(clframe.load(result.run_folder).network, clframe.load(whole.run_folder).network)
    assert math.isnan(result.accuracy_matrix[1][0]) and result.accuracy_matrix[1][1] == whole.accuracy_matrix[1][1]
    assert result.accuracy_matrix[0][0] == whole.accuracy_matrix[0][0]
    assert {"final_average_accuracy", "final_weighted_accuracy", "forgetting"} <= set(result.undefined)
    assert len(again.accuracy_matrix) == 3 and math.isnan(again.accuracy_matrix[2][0])
    assert clframe.load(again.run_folder).class_names == ("0", "1", "2", "3")


def test_training_on_data_that_are_gone_is_refused(tmp_path: Path, movable: tuple[Result, Path]) -> None:
    run, here = movable
    result = extend(run.run_folder, more(2), output=tmp_path)
    config = Path(result.run_folder) / "config.yaml"
    message = (
        f"^experience 1: cannot be trained, its earlier data are gone .{here}: no such folder; restore it.; restore"
    )
    here.rename(here.with_name("moved"))
    try:
        with pytest.raises(DataError, match=message):
            clframe.run(str(config), output=tmp_path / "again")
        assert not (tmp_path / "again").exists()
        again = clframe.run(resume=result.run_folder)  # is finished and needs no training
        assert again.accuracy_matrix == result.accuracy_matrix
        # A run that has yet to learn them is refused as well, and kept.
        for file in (Path(result.run_folder) / "checkpoints").iterdir():
            file.unlink()
        with pytest.raises(DataError, match=r"^experience 1: cannot be trained, .*; restore the data there, or edit "):
            clframe.run(resume=result.run_folder)
        assert config.is_file()
    finally:
        here.with_name("moved").rename(here)


def test_data_that_the_run_has_learned_are_reported(
    tmp_path: Path, movable: tuple[Result, Path], caplog: pytest.LogCaptureFixture
) -> None:
    from clframe.targets.extension import plan_extension

    run, here = movable
    own = ["benchmark=digits_part", "benchmark.only=[0, 1]", f"benchmark.available={here}"]
    plan_extension(run.run_folder, own, output=tmp_path)
    assert caplog.messages == ["digits_part: are data that the run has already learned; they are learned again"]
    caplog.clear()
    plan_extension(run.run_folder, more(1, 2), output=tmp_path)
    assert caplog.messages == []


def test_checkpoints_of_earlier_versions(tmp_path: Path, parent: Result, child: Result) -> None:
    import shutil

    old = tmp_path / "old"
    shutil.copytree(parent.run_folder, old)
    file = old / "checkpoints" / "experience_002.ckpt"
    content = torch.load(file, weights_only=True)
    for key in ("class_names", "inputs", "dtype"):  # recorded since; read from the data of the run
        del content["data"][key]
    torch.save(content, file)
    result = extend(old, more(4, 5), output=tmp_path)
    assert fields(result) == fields(child)


def test_changed_data_are_refused(parent: Result, movable: tuple[Result, Path], tmp_path: Path) -> None:
    run, _ = movable
    config = Path(run.run_folder) / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("- 0\n  - 1\n", "- 0\n  - 1\n  - 5\n"))
    assert config.read_text() != before
    try:
        with pytest.raises(DataError, match=r"^earlier data: digits has the classes 5, unlike when the run learned"):
            extend(run.run_folder, more(2), output=tmp_path)
        config.write_text(before.replace("experiences: 1\n", "experiences: 3\n"))
        message = r"^earlier data: digits cannot be split as when the run learned it \(benchmark.experiences: found 3 for 2"
        with pytest.raises(DataError, match=message):
            extend(run.run_folder, more(2), output=tmp_path)
    finally:
        config.write_text(before)
    assert not list(tmp_path.iterdir())
