"""The comparison with Avalanche's strategies gives both sides the same start and does its arithmetic right."""

from __future__ import annotations

import json

import peer_bic
import peer_course
import peer_runs
import pytest
import strategy_parity
import torch
from avalanche.core import SupervisedPlugin
from peer_strategies import Method

from clframe.data import Source, TensorSamples


def toy() -> Source:
    """Ten classes, each a shade of its own in a 4 x 4 image, 12 and 4 samples."""

    def part(per_class: int, seed: int) -> TensorSamples:
        y = torch.arange(10).repeat_interleave(per_class)
        corner = torch.zeros(len(y), 16)
        corner[torch.arange(len(y)), y] = 4
        noise = torch.randn(len(y), 16, generator=torch.Generator().manual_seed(seed))
        return TensorSamples((corner + 0.5 * noise).reshape(-1, 1, 4, 4), y)

    return Source("toy", part(12, 1), part(4, 2), classes=10)


SETTING = peer_course.Setting("toy", per_class=8, epochs=4, batch=8, memory=20)


def test_both_sides_get_the_same_samples_in_the_same_order_of_classes_and_the_same_weights():
    course = peer_course.Course(SETTING, seed=3, source=toy())
    theirs = course.theirs()
    for ours, experience in zip(course.benchmark.train, theirs.train_stream, strict=True):
        assert len(ours) == len(experience.dataset) == 2 * SETTING.per_class
        assert sorted(ours.y.tolist()) == sorted(experience.dataset.targets)
        own = sorted(map(tuple, ours.prepare(ours.raw(torch.arange(len(ours)))).flatten(1).tolist()))
        other = sorted(tuple(experience.dataset[i][0].flatten().tolist()) for i in range(len(ours)))
        assert own == other
    model = course.model()
    pairs = zip(model[0].parameters(), course.network.backbone.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    x = torch.randn(3, 1, 4, 4)
    assert model(x).shape == (3, 2) and course.model(growing=False)(x).shape == (3, 10)


@pytest.mark.parametrize("name", ["Replay", "EWC by sample"])
def test_a_duel_is_run_once_on_both_sides_and_kept(name, tmp_path, monkeypatch):
    monkeypatch.setitem(strategy_parity.SETTINGS, "toy", SETTING)
    make = peer_course.Course
    monkeypatch.setattr(
        peer_course, "Course", lambda *args, data_dir=None, **options: make(*args, **options, source=toy())
    )
    threads = torch.get_num_threads()
    accuracies = {}
    for side in strategy_parity.SIDES:
        duel = strategy_parity.Duel("toy", name, side, seed=0)
        assert strategy_parity.finished(duel, tmp_path) is None
        path = strategy_parity.run_duel(duel, tmp_path)
        accuracies[side] = content = json.loads(path.read_text())
        assert strategy_parity.finished(duel, tmp_path) == path
        assert 0 < content["agnostic"] <= content["aware"] <= 1
        assert content["agnostic"] * 40 == pytest.approx(round(content["agnostic"] * 40))  # of 40 test samples
        kept = path.stat().st_mtime_ns
        assert strategy_parity.run_duel(duel, tmp_path) == path and path.stat().st_mtime_ns == kept
    if name == "Replay":  # a memory keeps both well above the last experience's share
        assert min(side["agnostic"] for side in accuracies.values()) > 0.4
    torch.set_num_threads(threads)


class Steps(SupervisedPlugin):
    """Counts training steps."""

    count = 0

    def after_training_iteration(self, strategy, **kwargs):
        self.count += 1


@pytest.mark.slow
def test_changes_of_bic_are_named_ones(monkeypatch):
    def answers(made):
        steps = Steps()

        def make(course, shared):
            strategy = made(course, shared)
            strategy.plugins.append(steps)
            return strategy

        monkeypatch.setitem(strategy_parity.METHODS, "toy", Method(lambda s: "naive", make))
        course = peer_course.Course(SETTING, seed=0, source=toy())
        return peer_runs.final_accuracy(course, "toy", "theirs"), steps.count

    unchanged = answers(peer_course.own("BiC", mem_size=SETTING.memory, val_percentage=0.1))
    assert answers(peer_bic.bic()) == unchanged
    assert answers(peer_bic.bic("softmax", "memory", "pairs", "fit"))[1] == unchanged[1]
    # Of 16 new samples 14 or 15 are trained on, in 2 batches of 8; with up to 20 of memory, in up to 5.
    assert unchanged[1] == 5 * 4 * 2 < answers(peer_bic.bic("pool"))[1] <= 4 * (2 + 4 * 5)


def test_a_verdict_is_that_of_paired_differences():
    ours = {0: 50.0, 1: 60.0, 2: 70.0}
    theirs = {0: 48.0, 1: 61.0, 2: 66.0, 3: 99.0}  # seed 3 has no partner
    found = {"ours": {s: {"aware": v} for s, v in ours.items()}, "theirs": {s: {"aware": v} for s, v in theirs.items()}}
    result = strategy_parity.verdict(found, "aware")
    assert result.ours == (60.0, 10.0)
    assert result.theirs[0] == pytest.approx(175 / 3)
    assert result.difference == pytest.approx(5 / 3)  # of 2, -1 and 4
    assert result.error == pytest.approx((19 / 3) ** 0.5 / 3**0.5)
    assert result.within
    apart = {"ours": found["ours"], "theirs": {s: {"aware": v - 10 + 0.1 * s} for s, v in ours.items()}}
    assert not strategy_parity.verdict(apart, "aware").within
    assert strategy_parity.verdict({"ours": found["ours"], "theirs": {}}, "aware") is None


def test_the_table_says_where_two_standard_errors_are_exceeded():
    measures = {"agnostic": 50.0, "aware": 90.0}
    shifted = {"agnostic": 50.0, "aware": 80.0}
    rows = {"Replay": {"ours": {0: measures, 1: measures}, "theirs": {0: measures, 1: shifted}},
            "EWC": {"ours": {0: measures, 1: measures}, "theirs": {0: shifted, 1: shifted}}}  # fmt: skip
    lines = strategy_parity.table("toy", rows).splitlines()
    assert lines[-2].endswith("| 90.0 ± 0.0 | 85.0 ± 7.1 | +5.0 (SE 5.0) | yes |")
    assert lines[-1].endswith("| 90.0 ± 0.0 | 80.0 ± 0.0 | +10.0 (SE 0.0) | no: aware |")


def test_every_definition_and_defect_is_in_the_notes():
    text = strategy_parity.notes(list(strategy_parity.METHODS))
    for name, method in strategy_parity.METHODS.items():
        assert (f"| {name} |" in text) is bool(method.definition or method.defect)
        assert method.definition in text and method.defect in text
