"""Another package extends clframe by entry points: examples/third_party, installed with pip."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


DRIVER = """
import contextlib, io, json, os, pathlib, sys, traceback
import torch, torch.utils.flop_counter, yaml, omegaconf, numpy  # before a fork: importing them takes seconds

def answer(commands, site, cwd):
    os.chdir(cwd)
    sys.path[0] = site
    from clframe.cli import main
    for words in commands:
        runs = [str(path) for path in pathlib.Path().glob("out/*/*")]
        words = [runs[0] if word == "RUN" and runs else word for word in words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        yield code, out.getvalue(), err.getvalue()

assert not any(name.split(".")[0] in ("clframe", "strategies") for name in sys.modules)
for line in sys.stdin:
    if os.fork() == 0:
        try:
            print(json.dumps(list(answer(*json.loads(line)))), flush=True)
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        os._exit(0)
    os.wait()
"""
"""An interpreter that has not imported clframe answers each line of commands in a separate process, forked before that
import; RUN is the folder of the run."""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=tmp_path_factory.mktemp("start"),
    )  # fmt: skip
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def clframe(interpreter):
    """Run commands with the packages in a folder."""

    def run(*commands, site, cwd):
        interpreter.stdin.write(json.dumps([commands, str(site), str(cwd)]) + "\n")
        interpreter.stdin.flush()
        answers = json.loads(interpreter.stdout.readline())
        assert not isinstance(answers, str), answers
        return [Answer(*answer) for answer in answers]

    return run


@pytest.mark.slow
def test_it_is_listed_trained_composed_and_checked_like_ours(clframe, installed, tmp_path):
    listed, every, ran, misspelled = clframe(
        ["list", "strategies", "anchor"],
        ["list", "strategies"],
        ["run", "smoke/quickstart", "strategy=er + anchor(strength=0.5)", "--output", "out"],
        ["explain", "quickstart", "strategy=anchor(strenght=1)"],
        site=installed, cwd=tmp_path,
    )  # fmt: skip
    assert [answer.code for answer in (listed, every, ran, misspelled)] == [0, 0, 0, 2]
    line, option, *_ = listed.out.splitlines()
    assert line.startswith("anchor ") and "Anchor: penalize the distance of the backbone's weights" in line
    assert option.startswith("  strength=0.01  (number)")
    assert line in every.out.splitlines()
    (metrics,) = tmp_path.glob("out/*/*/metrics.csv")
    assert "loss/anchor/distance" in metrics.read_text()
    assert "components.anchor.strenght: unknown option; did you mean 'strength'?" in misspelled.err


def test_one_run_uses_every_kind_of_entry_by_name(clframe, installed, tmp_path):
    names = (("backbones", "lenet"), ("benchmarks", "stripes"), ("configs", "backbone/lenet"))
    *listed, ran, timed = clframe(
        *(["list", what, name] for what, name in names),
        ["run", "quickstart", "strategy=anchor + exits + early_exit(measure='top_two_ratio', budget=0.5)", "backbone=lenet",
         "benchmark=stripes", "benchmark.experiences=2", "benchmark.validation=0.2", "trainer.epochs=2", "--output", "out"],
        ["latency", "RUN", "--repeats", "1", "--batches", "1"],
        site=installed, cwd=tmp_path,
    )  # fmt: skip
    for answer, (_, name) in zip(listed, names, strict=True):
        assert answer.code == 0 and answer.out.startswith(f"{name} ")
    assert ran.code == 0, ran.err
    (folder,) = tmp_path.glob("out/quickstart/*")
    results = json.loads((folder / "results.json").read_text())
    assert (results["benchmark"], results["backbone"]) == ("stripes", "lenet")
    assert results["strategy"] == "anchor + exits + early_exit"
    matrix = results["accuracy_matrix"]
    assert results["metrics"]["worst_accuracy"] == min(matrix[-1])
    config = (folder / "config.yaml").read_text()
    assert all(f"name: {name}\n" in config for name in ("lenet", "stripes")) and "top_two_ratio" in config
    assert timed.code == 0 and "policy" in timed.out


BROKEN = {
    "odd": ("broken_package:X", "entry point odd = broken_package:X"),
    "other": ("clframe.errors:ClframeError", "is not a Component class"),
    "exits_early": ("leaves:X", "entry point exits_early = leaves:X (exits with 3 when it is imported)"),
}


def test_a_broken_package_is_reported_and_stops_nothing_and_a_missing_one_is_unknown(clframe, tmp_path):
    metadata = tmp_path / "odd-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    points = "".join(f"{name} = {value}\n" for name, (value, _) in BROKEN.items())
    (metadata / "entry_points.txt").write_text(f"[clframe.components]\n{points}")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    listed, *explained, unknown = clframe(
        ["list", "strategies"],
        *(["explain", "quickstart", f"strategy={name}"] for name in BROKEN),
        ["explain", "quickstart", "strategy=anchor"],
        site=tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert listed.code == 0 and "er " in listed.out
    lines = listed.err.splitlines()
    assert sorted(line.split(" = ")[0] for line in lines) == sorted(
        f"clframe: not loaded: entry point {name}" for name in BROKEN
    )
    for answer, (_, found) in zip(explained, BROKEN.values(), strict=True):
        assert answer.code == 2 and "not loaded: entry point" in answer.err and found in answer.err
    assert unknown.code == 2 and "unknown component 'anchor'" in unknown.err


def test_two_packages_of_one_name_are_refused_naming_both(clframe, tmp_path):
    (tmp_path / "twin.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom clframe.core import Component\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Twin(Component):\n    name: ClassVar[str] = 'er'\n"
    )
    metadata = tmp_path / "twin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[clframe.components]\ntwin = twin:Twin\n")
    ((code, _, message),) = clframe(["list", "strategies"], site=tmp_path, cwd=tmp_path)
    assert code == 2
    assert "component 'er': registered twice, by strategies.er.ER and twin.Twin" in message


def test_a_foreign_strategies_package_that_shadows_ours_is_named(clframe, tmp_path):
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("")
    ((code, _, message),) = clframe(["list", "strategies"], site=tmp_path, cwd=tmp_path)
    assert code == 2
    assert "'strategies' found at" in message and str(tmp_path) in message and "rename it" in message
