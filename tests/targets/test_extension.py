"""Extensions of runs: a chain equals one run over the same stream; what is matched, refused and reported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe.api import extend
from clframe.data import SOURCES, Source, TensorSamples, digits
from clframe.data.chain import Stored, extend_benchmark, match_classes
from clframe.errors import ClframeError, ConfigError, DataError, RunFolderError, UnsupportedError
from clframe.results import Result

FAST = (
    "backbone=mlp", "backbone.width=32", "trainer.epochs=1", "trainer.threads=1", "trainer.accelerator=cpu",
    "trainer.loggers=[]", "trainer.progress=false", "benchmark.class_order=sorted",
)  # fmt: skip
CHANGED = ("train_seconds", "run_folder", "versions")
"""Fields of results.json that differ between two runs of one config."""


def part_of_digits(*, only: tuple[int, ...] = (), names: tuple[str, ...] = (), available: str = "") -> Source:
    """Some classes of the digits; with ``available``, only while that file exists."""
    if available and not Path(available).exists():
        raise DataError(f"{available}: no such folder; restore it")
    whole = digits()
    wanted = torch.tensor(only)

    def pick(samples: TensorSamples) -> TensorSamples:
        chosen = samples.subset(torch.isin(samples.y, wanted).nonzero().flatten())
        return replace(chosen, y=torch.searchsorted(wanted, chosen.y))

    named = names or tuple(whole.class_names[c] for c in only)
    return replace(whole, train=pick(whole.train), test=pick(whole.test), classes=len(only), class_names=named)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    SOURCES.register("digits_part")(part_of_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clframe.execution.write_figures", lambda *_: None)  # takes longer than training
        yield
    del SOURCES._entries["digits_part"]


def more(*only: int) -> list[str]:
    return ["benchmark=digits_part", f"benchmark.only={list(only)}"]


def same(one: Any, other: Any) -> bool:
    """Whether two nested states have the same bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if hasattr(one, "state_dict"):
        return same(dict(one.state_dict()), dict(other.state_dict()))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def fields(result: Result) -> dict[str, Any]:
    return {key: value for key, value in json.loads(result.to_json()).items() if key not in CHANGED}


def assert_same_run(chain: Result, whole: Result) -> None:
    """Weights, states of components and every number of results.json."""
    assert fields(chain) == fields(whole)
    ours, theirs = clframe.load(chain.run_folder), clframe.load(whole.run_folder)
    assert same(ours.network, theirs.network)
    assert same(ours.learner.state, theirs.learner.state)


def train(folder: Path, *overrides: str) -> Result:
    return clframe.run("quickstart", [*FAST, *overrides], output=folder)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("parent"), "strategy=er", "benchmark.classes=4", "benchmark.experiences=2")


@pytest.fixture(scope="module")
def child(parent: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return extend(parent.run_folder, more(4, 5), output=tmp_path_factory.mktemp("child"))


# --- a chain equals one run ----------------------------------------------------------------------


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


# --- what an extended run contains ---------------------------------------------------------------


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


# --- more samples of known classes ---------------------------------------------------------------


def test_known_classes_get_more_samples(tmp_path: Path, parent: Result) -> None:
    planned: list[Any] = []
    result = extend(parent.run_folder, more(1, 7), output=tmp_path, on_planned=planned.append)
    assert (planned[0].known, planned[0].new) == (("1",), ("7",))
    assert result.experiences[2] == (1, 4) and result.class_names[4] == "7"
    assert len(clframe.load(result.run_folder).class_order) == 5
    # Before the extension the model knew class 1: accuracy on the new test data then was not evaluated, and is not 0.
    assert all(math.isnan(row[2]) for row in result.accuracy_matrix[:2])
    assert "forward_transfer" in result.undefined and not math.isnan(result.final_average_accuracy)


# --- earlier data that are gone or changed -------------------------------------------------------


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


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "extend: found no new data; give them, such as benchmark=image_folder benchmark.path=new_photos"),
        ([*more(4), "backbone.width=8"], "backbone.width is part of what the run has learned and stays"),
        ([*more(4), "strategy=naive"], "strategy is part of what the run has learned and stays"),
        ([*more(4), "components.er.memory=3"], "components.er.memory is part of what the run has learned and stays"),
        ([*more(4), "seed=3"], "seed is part of what the run has learned and stays"),
        ([*more(4), "earlier=[]"], "earlier is part of what the run has learned and stays"),
        ([*more(4), "benchmark.protocol=task_incremental"], "benchmark.protocol: found task_incremental, but the stream"),
        ([*more(4), "benchmark.online=8"], "benchmark.online: found 8, but the stream of the run has None"),
        ([*more(4), "benchmark.validation=0.2"], "benchmark.validation: found 0.2, unlike the data before; give 0"),
        ([*more(4), "trainer.epoch=3"], "did you mean 'trainer.epochs'"),
        ([*more(4), "benchmark.experiences=2"], "benchmark.experiences: found 2 for 1 class; give at most 1"),
        ([*more(4), "benchmark.names=[' 3']"], "found the class ' 3', but the run knows '3'; name it '3' if"),
        (["benchmark=digits_part", "benchmark.only=[4]", "benchmark.names=['03']"], "found the class '03', but the run"),
    ],
)  # fmt: skip
def test_bad_overrides(tmp_path: Path, parent: Result, overrides: list[str], message: str) -> None:
    with pytest.raises(ClframeError) as refused:
        extend(parent.run_folder, overrides, output=tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def other_inputs(x: Tensor, **inputs: Any) -> Source:
    source = part_of_digits(only=(4,))
    samples = TensorSamples(x, torch.zeros(len(x), dtype=torch.long))
    return replace(source, train=samples, test=samples, inputs=replace(source.inputs, **inputs))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (other_inputs(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), "found inputs of shape 3 x 8 x 8, but the run was"),
        (other_inputs(torch.zeros(4, 1, 8, 8)), "found inputs of type float32, but the run was trained on uint8"),
        (other_inputs(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), largest=255), "images with a largest value of 255"),
    ],
)
def test_inputs_that_mean_something_else(tmp_path: Path, parent: Result, source: Source, message: str) -> None:
    with pytest.raises(DataError) as refused:
        extend(parent.run_folder, source, output=tmp_path)
    assert message in str(refused.value)


def test_runs_that_cannot_be_extended(tmp_path: Path, parent: Result) -> None:
    import shutil

    with pytest.raises(RunFolderError, match=r"^extend: no folder "):
        extend(tmp_path / "nothing", more(4))
    copied = tmp_path / "copied"
    shutil.copytree(parent.run_folder, copied)
    (copied / "results.json").rename(copied / "kept.json")
    with pytest.raises(RunFolderError, match=r": is not finished; finish it first with clframe run --resume "):
        extend(copied, more(4))
    (copied / "kept.json").rename(copied / "results.json")
    (copied / "checkpoints" / "experience_002.ckpt").unlink()
    with pytest.raises(RunFolderError, match=r": its newest checkpoint is of experience 1 of 2; restore the last one"):
        extend(copied, more(4))
    (copied / "checkpoints" / "experience_001.ckpt").unlink()
    with pytest.raises(RunFolderError, match=r": has no checkpoint yet"):
        extend(copied, more(4))


def test_strategies_that_depend_on_the_end_of_the_stream(tmp_path: Path) -> None:
    run = train(tmp_path, "strategy=joint", "benchmark.classes=2", "benchmark.experiences=1")
    with pytest.raises(UnsupportedError, match=r"^extend: 'joint' trains at the end of a stream, which is now later"):
        extend(run.run_folder, more(4))


def test_an_extension_that_learns_nothing_leaves_no_folder(
    tmp_path: Path, parent: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedError("er: cannot train here; do something else")

    monkeypatch.setattr("clframe.training.session.Session._train", refuse)
    with pytest.raises(UnsupportedError, match=r"^er: cannot train here"):
        extend(parent.run_folder, more(4), output=tmp_path)
    assert not list(tmp_path.iterdir())


# --- pure functions ------------------------------------------------------------------------------


def test_classes_are_matched_by_name() -> None:
    assert match_classes(["a", "b"], ["c", "b", "d"], where="x") == (2, 1, 3)
    assert match_classes(["0", "1"], ["1", "cat"], where="x") == (1, 2)
    with pytest.raises(DataError, match=r"^x: found the class 'Cat', but the run knows 'cat'; name it 'cat' if"):
        match_classes(["cat"], ["Cat"], where="x")
    with pytest.raises(DataError, match=r"^x: found the class '3', a number, but the classes of the run have names"):
        match_classes(["cat"], ["3"], where="x")


def test_held_out_samples_are_those_of_one_source() -> None:
    whole = clframe.class_incremental(digits(), experiences=2, order="sorted", validation=0.2, seed=3)
    first = clframe.class_incremental(
        part_of_digits(only=(0, 1, 2, 3, 4)), experiences=1, order="sorted", validation=0.2, seed=3
    )
    joined = extend_benchmark(first, part_of_digits(only=(5, 6, 7, 8, 9)), validation=0.2, seed=3)
    for ours, theirs in zip(joined.validation, whole.validation, strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y)  # type: ignore[union-attr]


def test_later_data_are_normalized_as_the_first() -> None:
    first = clframe.class_incremental(part_of_digits(only=(0, 1)), experiences=1)
    source = part_of_digits(only=(2,))
    other = {"mean": (1.0,), "std": (2.0,)}
    source = replace(source, train=replace(source.train, **other), test=replace(source.test, **other))
    joined = extend_benchmark(first, source)
    assert joined.train[1].mean == joined.train[0].mean == Stored.of(first).mean == (4.884,)
    with pytest.raises(ConfigError, match=r"^benchmark.validation: found 0.1, unlike the data before; give 0"):
        extend_benchmark(first, source, validation=0.1)
