"""The choice of defaults reads no test data and keeps to its rules."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import choose_defaults
import numpy as np
import pytest
from choose_defaults import Row, cell, chosen
from default_grids import GRIDS, SETTINGS, Grid

import clframe
from clframe.build import build
from clframe.core import parse


def row(strength, *settings):
    return Row({"strength": strength}, dict(zip("abc", settings, strict=False)), {})


@pytest.mark.parametrize("component", GRIDS)
def test_candidates_build_are_told_apart_and_differ_in_numbers_only(component):
    grid = GRIDS[component]
    assert len({str(options) for options in grid.candidates}) == len(grid.candidates)
    for options in grid.candidates:
        one = cell(component, grid.settings[0], options, 7, subset=Path("none.npz"))
        expression = next(text for text in one.overrides if text.startswith("strategy=")).removeprefix("strategy=")
        made = [found for found in parse(expression) if found.name == component]
        if options == {"strength": 0.0}:  # no penalty is no component
            assert not made
        else:
            assert {key: getattr(made[0], key) for key in options} == dict(options)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_evaluated_is_a_part_of_the_training_samples(setting, tmp_path):
    subset = tmp_path / "subset.npz"
    y = np.repeat(np.arange(10), 100)
    np.savez(subset, x=np.arange(1000 * 49, dtype=np.int64).reshape(1000, 7, 7), y=y)
    one = cell("sparsity", setting, {"strength": 0.0}, 100, subset=subset)
    benchmark = build(clframe.load_config(one.config, [*one.overrides, f"seed={one.seed}"])).benchmark
    assert benchmark.evaluate == "validation"
    sizes = [sum(map(len, part)) for part in (benchmark.train, benchmark.validation)]
    assert 0.18 < sizes[1] / sum(sizes) < 0.22


def grid(rule, published):
    return Grid("", ["a", "b"], [], published={"strength": published}, rule=rule)


def test_the_best_is_the_highest_mean_over_settings_of_the_same_weight():
    first, second = row(1, [90.0, 92.0], [50.0, 54.0]), row(2, [80.0, 80.0], [64.0, 66.0])
    assert (first.mean, second.mean) == (71.5, 72.5)
    assert first.error == pytest.approx(sqrt(2 / 2 + 8 / 2) / 2)
    assert chosen([first, second], grid("best", 2)) is second


def test_what_is_published_stays_unless_another_is_three_standard_errors_better():
    standing = row(1, [70.0, 80.0], [50.0, 50.0])
    clear, unclear = row(2, [71.0, 81.0], [50.5, 50.5]), row(3, [70.0, 86.0], [50.0, 60.0])
    difference = unclear.above(standing)  # 0 and 6, 0 and 10
    assert difference.mean == 4.0 and difference.error == pytest.approx(sqrt(18 / 2 + 50 / 2) / 2)
    assert clear.above(standing).error == 0
    assert chosen([standing, unclear], grid("best", 1)) is standing
    assert chosen([standing, clear], grid("best", 1)) is clear
    assert chosen([unclear, standing, clear], grid("best", 1)) is standing  # the best alone is asked


def test_of_candidates_like_the_best_the_first_is_taken():
    standing, best = row(1, [70.0, 80.0], [50.0, 50.0]), row(2, [75.0, 85.0], [55.0, 55.0])
    alike, lower = row(3, [74.0, 85.0], [55.0, 55.0]), row(4, [74.0, 84.0], [55.0, 55.0])
    assert (best.above(alike).mean, best.above(alike).error) == (0.25, 0.25)
    assert chosen([standing, best, alike], grid("best", 1)) is best
    assert chosen([standing, lower, alike, best], grid("best", 1)) is alike


def test_the_largest_is_within_one_standard_error_of_the_smallest():
    least = row(0, [90.0, 92.0], [50.0, 54.0])  # mean 71.5, standard error 1.12
    near, far = row(0.1, [90.0, 90.0], [51.0, 51.0]), row(0.3, [80.0, 80.0], [60.0, 60.0])
    back = row(1, [88.0, 88.0], [54.0, 54.0])
    assert chosen([far, near, least], grid("largest", 0)) is near
    assert chosen([far, near, least, back], grid("largest", 0)) is back


def test_a_table_is_read_from_results(tmp_path, monkeypatch):
    candidates = [{"strength": 0.0}, {"strength": 0.5}]
    found = Grid("", ["digits"], candidates, published={"strength": 0.0}, rule="largest")
    monkeypatch.setitem(GRIDS, "sparsity", found)
    wanted = {}
    for number, accuracies in enumerate(([0.5, 0.7], [0.4, 0.7])):
        paths = [tmp_path / f"{number}-{seed}" / "results.json" for seed in range(2)]
        for path, accuracy in zip(paths, accuracies, strict=True):
            path.parent.mkdir()
            path.write_text(json.dumps({"final_average_accuracy": accuracy}))
            (path.parent / "zeros.json").write_text(json.dumps(0.25 + number / 2))
        wanted["digits", number] = paths
    lines = choose_defaults.table("sparsity", choose_defaults.read("sparsity", wanted)).splitlines()
    assert lines[4] == "| strength 0 | 60.0 ± 14.1 | 60.0 | - | 25 |"
    assert lines[5] == "| strength 0.5 | 55.0 ± 21.2 | 55.0 | -5.0 (SE 5.0) | 75 |"
    assert lines[-1] == "chosen: strength 0.5 (55.0, SE 15.0)"
