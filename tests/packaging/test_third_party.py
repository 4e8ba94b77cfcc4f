"""A package of somebody else's brings a component: examples/third_party, installed for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example package in a folder of its own; the checkout stays as it is."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "package")
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        check=True,
    )  # fmt: skip
    return target


def clframe(*arguments, site, cwd, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "clframe", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_it_is_listed_trained_and_composed(installed, tmp_path):
    line, option, *_ = clframe("list", "strategies", "anchor", site=installed, cwd=tmp_path).splitlines()
    assert line.startswith("anchor ") and "Anchor: hold the backbone near the weights" in line
    assert option.startswith("  strength=0.01  (number)")
    assert line in clframe("list", "strategies", site=installed, cwd=tmp_path).splitlines()
    clframe("run", "smoke/quickstart", "strategy=er + anchor(strength=0.5)", "--output", "out",
            site=installed, cwd=tmp_path)  # fmt: skip
    (metrics,) = tmp_path.glob("out/*/*/metrics.csv")
    assert "loss/anchor/distance" in metrics.read_text()


def test_its_options_are_checked_like_ours(installed, tmp_path):
    message = clframe(
        "explain", "quickstart", "strategy=anchor(strenght=1)", site=installed, cwd=tmp_path, code=2
    )
    assert "components.anchor.strenght: unknown option; did you mean 'strength'?" in message


def test_without_the_package_the_name_is_unknown(tmp_path):
    message = clframe("explain", "quickstart", "strategy=anchor", site=tmp_path, cwd=tmp_path, code=2)
    assert "unknown component 'anchor'" in message


@pytest.mark.parametrize(
    "value, found",
    [
        ("broken_package:X", "not loaded: entry point odd = broken_package:X"),
        ("clframe.errors:ClframeError", "is not a Component class"),
    ],
)
def test_a_broken_package_takes_nobody_down(value, found, tmp_path):
    metadata = tmp_path / "odd-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[clframe.components]\nodd = {value}\n")
    assert "er " in clframe("list", "strategies", site=tmp_path, cwd=tmp_path)
    assert found in clframe("explain", "quickstart", "strategy=odd", site=tmp_path, cwd=tmp_path, code=2)


def test_two_packages_of_one_name_are_refused_naming_both(tmp_path):
    (tmp_path / "twin.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom clframe.core import Component\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Twin(Component):\n    name: ClassVar[str] = 'er'\n"
    )
    metadata = tmp_path / "twin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[clframe.components]\ntwin = twin:Twin\n")
    message = clframe("list", "strategies", site=tmp_path, cwd=tmp_path, code=2)
    assert "component 'er': registered twice, by strategies.er.ER and twin.Twin" in message


def test_a_foreign_strategies_package_that_shadows_ours_is_named(tmp_path):
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("")
    message = clframe("list", "strategies", site=tmp_path, cwd=tmp_path, code=2)
    assert "'strategies' found at" in message and str(tmp_path) in message and "rename it" in message
