"""Names of groups, the group that others are compared with, and notices about groups that cannot be compared."""

from __future__ import annotations

import pytest

from clframe.report.comparable import choose_base, notices_of, settings_table
from clframe.report.comparison import group_runs
from clframe.report.labels import full_labels, labels_of
from clframe.report.loading import load_run

PLAIN = {
    "strategy": "er", "name": "quickstart", "backbone.name": "small_cnn", "benchmark.experiences": "5",
    "benchmark.class_order": "seeded", "optimizer.name": "adam", "optimizer.lr": "0.002", "trainer.epochs": "10",
    "er.memory": "200",
}  # fmt: skip


def varied(**changes):
    return {**PLAIN, **{key.replace("__", "."): value for key, value in changes.items()}}


def test_few_differences_are_all_in_the_names():
    settings = [varied(), varied(backbone__name="mlp"), varied(strategy="lwf", trainer__epochs="3")]
    assert labels_of(settings) == full_labels(settings) == [
        "er, backbone=small_cnn, epochs=10", "er, backbone=mlp, epochs=10", "lwf, backbone=small_cnn, epochs=3",
    ]  # fmt: skip


def test_long_names_leave_out_what_most_groups_have():
    order = "[" + ", ".join(map(str, range(20))) + "]"
    settings = [
        varied(),
        varied(backbone__name="mlp"),
        varied(strategy="lwf", benchmark__class_order=order, optimizer__name="sgd", optimizer__lr="0.1", trainer__epochs="3"),
        varied(strategy="naive"),
        varied(strategy="naive", trainer__epochs="3"),
    ]
    assert labels_of(settings) == [
        "er", "er, backbone=mlp", "lwf, class_order=[0, 1, 2, 3, 4, 5, 6,..., lr=0.1, optimizer=sgd, 1 more", "naive",
        "naive, epochs=3",
    ]  # fmt: skip
    # Names that would be equal are not cut.
    settings.append({**settings[2], "trainer.epochs": "4"})
    assert labels_of(settings)[2:] == [
        f"lwf, class_order={order}, lr=0.1, optimizer=sgd, epochs=3", "naive", "naive, epochs=3",
        f"lwf, class_order={order}, lr=0.1, optimizer=sgd, epochs=4",
    ]  # fmt: skip
    settings = [{**flat, "name": name} for flat in settings[:3] for name in ("one", "two")]
    assert labels_of(settings)[:4] == ["one: er", "two: er", "one: er, backbone=mlp", "two: er, backbone=mlp"]


@pytest.fixture
def different(make_run):
    """Four groups of one benchmark; the first one is comparable with none."""
    long = ["optimizer.name=sgd", "optimizer.lr=0.1", "trainer.batch_size=64", "trainer.precision=bf16-mixed"]
    paths = [
        make_run("a", (12, 18), overrides=["benchmark.validation=0.25"]),
        make_run("b", (12, 18), strategy="lwf"),
        make_run("c", (14, 18), strategy="naive", overrides=long),
        make_run("d", (14, 18), strategy="joint", seed=1),
    ]
    groups, notices = group_runs([load_run(path) for path in paths])
    assert notices == []
    return groups


def test_the_group_with_which_most_are_comparable_is_the_reference(different):
    assert [group.label for group in different] == [
        "er, validation=0.25", "lwf", "naive, lr=0.1, optimizer=sgd, batch_size=64, 1 more", "joint",
    ]  # fmt: skip
    base = choose_base(different)
    assert base is different[1] and choose_base(different[1:]) is different[1] and choose_base(different[:2]) is different[0]
    assert notices_of(different, base) == [
        "Groups have different seeds: 'er, validation=0.25', 'lwf', 'naive, lr=0.1, optimizer=sgd, batch_size=64, 1 more' "
        "without seed 1; 'joint' without seed 0. Differences are over common seeds only.",
        "Some groups are not comparable with 'lwf': 'er, validation=0.25' (benchmark.validation differs). No difference "
        "from them is shown.",
    ]
    assert notices_of(different[1:3], base) == []


def test_settings_that_names_leave_out_are_in_a_table(different):
    table = settings_table(different)
    assert table is not None and table.columns == ("setting", "value", "groups")
    long = different[2].label
    assert table.rows[:2] == (
        ("benchmark.validation", "0.25", "er, validation=0.25"), ("benchmark.validation", "0.0", f"lwf; {long}; joint"),
    )  # fmt: skip
    assert ("trainer.precision", "bf16-mixed", long) in table.rows and len(table.rows) == 10
    assert settings_table(different[1:2]) is None
