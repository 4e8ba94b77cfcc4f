"""Every component trains as its golden file says: a refactor changes no number by more than one part in 1e9."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
try:
    import regenerate
finally:
    sys.path.remove(str(Path(__file__).parent))


def recorded(name):
    path = regenerate.path_of(name)
    if not path.exists():
        pytest.fail(f"{name} has no golden file; make it with: python tests/golden/regenerate.py {name}", pytrace=False)
    return json.loads(path.read_text(encoding="utf-8"))


def differences(before, now):
    """Where two golden curves differ, as lines to read."""
    return [
        f"{exits} exits, {part}: {before[exits][part]} before, {now[exits][part]} now"
        for exits in before
        for part in before[exits]
        if not alike(before[exits][part], now[exits][part])
    ]


def alike(before, now):
    if isinstance(before, list):
        return len(before) == len(now) and all(map(alike, before, now))
    return now == pytest.approx(before, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", regenerate.NAMES)
def test_it_trains_as_its_golden_file_says(name):
    found = differences(recorded(name), regenerate.golden(name))
    if found:
        again = f"python tests/golden/regenerate.py {name}"
        pytest.fail(f"{name} trains otherwise than before; if that is meant: {again}\n" + "\n".join(found), pytrace=False)


@pytest.mark.parametrize("name", regenerate.NAMES)
def test_a_file_contains_ten_losses_and_gradients_and_the_logits_of_every_exit(name):
    assert set(recorded(name)) == {"1", "3"}
    for exits, curve in recorded(name).items():
        assert len(curve["losses"]) == len(curve["gradients"]) == 10
        assert min(curve["gradients"]) > 0
        assert len(curve["scores"]) == 4 and {len(scores) for scores in curve["answers"]} == {4}
        if name != "exits":  # which adds its own
            assert len(curve["answers"]) == int(exits)


def test_no_file_is_left_of_a_component_that_is_gone():
    assert {path.stem for path in regenerate.FOLDER.glob("*.json")} <= set(regenerate.NAMES)


def test_every_component_but_the_identity_leaves_a_curve_of_its_own():
    curves = {name: json.dumps(recorded(name)) for name in regenerate.NAMES}
    assert len(set(curves.values())) == len(curves)


def test_a_component_without_a_file_fails_and_is_told_how_to_make_it():
    with pytest.raises(pytest.fail.Exception, match=r"make it with: python tests/golden/regenerate\.py brand_new"):
        recorded("brand_new")


@pytest.mark.parametrize("part, place", [("losses", 7), ("gradients", 4), ("scores", 2)])
def test_a_change_in_the_ninth_digit_is_seen(part, place):
    before = recorded("lwf")
    now = copy.deepcopy(before)
    now["3"][part][place] *= 1 + 3e-9
    assert [line.split(":")[0] for line in differences(before, now)] == [f"3 exits, {part}"]
    now["3"][part][place] = before["3"][part][place] * (1 + 1e-11)
    assert differences(before, now) == []
