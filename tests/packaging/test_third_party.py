"""Another package extends clframe by entry points: examples/third_party, installed with pip."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example package, installed in a new folder."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "package")
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        check=True,
    )  # fmt: skip
    return target


def call(*arguments, site, cwd, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "clframe", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def clframe(*arguments, code=0, **options):
    done = call(*arguments, code=code, **options)
    return done.stdout if code == 0 else done.stderr


def test_it_is_listed_trained_and_composed(installed, tmp_path):
    line, option, *_ = clframe("list", "strategies", "anchor", site=installed, cwd=tmp_path).splitlines()
    assert line.startswith("anchor ") and "Anchor: penalize the distance of the backbone's weights" in line
    assert option.startswith("  strength=0.01  (number)")
    assert line in clframe("list", "strategies", site=installed, cwd=tmp_path).splitlines()
    clframe("run", "smoke/quickstart", "strategy=er + anchor(strength=0.5)", "--output", "out",
            site=installed, cwd=tmp_path)  # fmt: skip
    (metrics,) = tmp_path.glob("out/*/*/metrics.csv")
    assert "loss/anchor/distance" in metrics.read_text()


def test_one_run_uses_every_kind_of_entry_by_name(installed, tmp_path):
    for what, name in (("backbones", "lenet"), ("benchmarks", "stripes"), ("configs", "backbone/lenet")):
        assert clframe("list", what, name, site=installed, cwd=tmp_path).startswith(f"{name} ")
    clframe(
        "run", "quickstart", "strategy=anchor + exits + early_exit(measure='top_two_ratio', budget=0.5)", "backbone=lenet",
        "benchmark=stripes", "benchmark.experiences=2", "benchmark.validation=0.2", "trainer.epochs=2", "--output", "out",
        site=installed, cwd=tmp_path,
    )  # fmt: skip
    (folder,) = tmp_path.glob("out/quickstart/*")
    results = json.loads((folder / "results.json").read_text())
    assert (results["benchmark"], results["backbone"]) == ("stripes", "lenet")
    assert results["strategy"] == "anchor + early_exit + exits"
    matrix = results["accuracy_matrix"]
    assert results["metrics"]["worst_accuracy"] == min(matrix[-1])
    config = (folder / "config.yaml").read_text()
    assert all(f"name: {name}\n" in config for name in ("lenet", "stripes")) and "top_two_ratio" in config
    again = clframe("latency", str(folder), "--repeats", "1", "--batches", "1", site=installed, cwd=tmp_path)
    assert "policy" in again


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
        ("leaves:X", "not loaded: entry point odd = leaves:X (exits with 3 when it is imported)"),
    ],
)
def test_a_broken_package_is_reported_and_stops_nothing(value, found, tmp_path):
    metadata = tmp_path / "odd-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[clframe.components]\nodd = {value}\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    listed = call("list", "strategies", site=tmp_path, cwd=tmp_path)
    assert "er " in listed.stdout
    assert listed.stderr.startswith("clframe: not loaded: entry point odd = ") and listed.stderr.count("\n") == 1
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
