"""``clframe check``: one line each, a JSON list, and the exit code."""

from __future__ import annotations

import json

import pytest

from clframe.targets import doctor
from clframe.targets.doctor import Finding

CHECKS = ["Python", "torch", "torchvision", "lightning", "avalanche-lib", "omegaconf", "other packages", "extras", "GPU",
          "threads", "data folder", "output"]  # fmt: skip


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """A machine without faults: this one may be short of space or cores."""
    monkeypatch.setattr(doctor, "LEAST_GB", 0.0)
    monkeypatch.setattr(doctor, "available_cores", lambda: 256.0)


@pytest.fixture
def trial(monkeypatch):
    """Replaces the run by what a test wants it to find."""

    def replace(finding):
        monkeypatch.setattr(doctor, "check_trial", lambda run: finding)

    return replace


def test_one_line_each(call, here, contents):
    code, out, err = call("check", "--no-run")
    assert (code, err) == (0, "")
    assert [line[5:20].strip() for line in out.splitlines()] == CHECKS
    assert {line[:5] for line in out.splitlines()} == {"ok   "}
    assert contents(here) == {}


def test_json_and_a_fault(call, trial):
    trial(Finding("small run", False, "RuntimeError: no", "repeat it"))
    code, out, _ = call("check", "--json")
    found = json.loads(out)
    assert code == 1
    assert [finding["check"] for finding in found] == [*CHECKS, "small run"]
    assert found[-1] == {"check": "small run", "ok": False, "found": "RuntimeError: no", "advice": "repeat it"}


def test_the_paths_of_a_config_are_checked(call, here):
    arguments = ("benchmark=image_folder", "benchmark.path=photos", "output=out", "--no-run")
    code, out, _ = call("check", "quickstart", *arguments)
    assert code == 1
    assert "fix  data           photos: no such file or folder; give an existing one as benchmark.path=PATH" in out
    assert f"ok   output         {here / 'out'}, will be made" in out
    (here / "photos").mkdir()
    assert call("check", "quickstart", *arguments).code == 0


def test_nothing_is_imported_that_must_not_be(call, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "2.6.3")
    monkeypatch.setattr(doctor, "check_gpu", lambda: pytest.fail("torch was imported"))
    code, out, _ = call("check")
    assert code == 1 and "lightning      2.6.3, a release that steals credentials; do not import it" in out


def test_bad_input(call):
    assert call("check", "quickstart", "nonsense=1", "--no-run").code == 2
    assert "did you mean 'quickstart'?" in call("check", "quickstrt", "--no-run").err
