"""``import clframe`` is small, lazy and quick: nothing heavy is loaded before it is used."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "lightning", "avalanche", "matplotlib", "sklearn", "tensorboard")
HELP = "import sys\nfrom clframe.cli import main\nsys.argv = ['clframe', '--help']\nsys.exit(main())"
LIMIT = 20
"""The public names are fewer than this."""


def heavy_after(code: str, *, cwd: Path) -> list[str]:
    """Which heavy packages a fresh interpreter holds after running ``code``."""
    probe = (
        "import atexit, json, sys\n"
        f"def report(): print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))\n"
        "atexit.register(report)\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    """The tests below could not fail if it did not."""
    assert "torch" in heavy_after("import torch", cwd=tmp_path)


def test_importing_clframe_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither torch nor lightning nor avalanche, nor what draws."""
    assert heavy_after("import clframe", cwd=tmp_path) == []


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    """``clframe --help`` answers before torch could be loaded."""
    assert heavy_after(HELP, cwd=tmp_path) == []


def test_help_names_the_verbs(tmp_path: Path) -> None:
    """The verbs are in the help."""
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for verb in ("run", "explain", "list"):
        assert verb in done.stdout


def test_listing_names_loads_nothing_heavy(tmp_path: Path) -> None:
    """Completion in an editor stays quick."""
    assert heavy_after("import clframe\ndir(clframe)", cwd=tmp_path) == []


def test_the_public_names_are_few_sorted_and_listed() -> None:
    """A list under twenty, each once, all shown by ``dir``."""
    clframe = importlib.import_module("clframe")
    names = list(clframe.__all__)
    assert 0 < len(names) < LIMIT
    assert len(set(names)) == len(names)
    assert set(names) <= set(dir(clframe))


def test_every_public_name_resolves() -> None:
    """A lazy name that points nowhere fails here rather than at a user's."""
    clframe = importlib.import_module("clframe")
    for name in clframe.__all__:
        assert getattr(clframe, name) is not None, name


def test_the_modules_that_the_documentation_names_are_attributes(tmp_path: Path) -> None:
    """``clframe.data.digits()`` needs no further import, in a fresh interpreter as well."""
    heavy_after("import clframe\nassert len(clframe.data.digits().class_names) == 10", cwd=tmp_path)
    clframe = importlib.import_module("clframe")
    named = {
        name
        for page in (Path(__file__).parents[2] / "docs").glob("*.md")
        for name in re.findall(r"\bclframe\.([a-z_]+)\.[A-Za-z]", page.read_text(encoding="utf-8"))
        if name not in clframe.__all__
    }
    assert {"data", "exits", "nn"} <= named <= set(dir(clframe))
    for name in clframe._MODULES:
        assert getattr(clframe, name) is importlib.import_module(f"clframe.{name}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Lazy look-up keeps Python's own manners, so ``hasattr`` works."""
    clframe = importlib.import_module("clframe")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = clframe.no_such_name
    assert not hasattr(clframe, "no_such_name")


def test_importing_clframe_changes_no_global_state(tmp_path: Path) -> None:
    """Warnings filters, environment and signal handlers are the user's."""
    code = (
        "import os, signal, warnings\n"
        "state = lambda: (list(warnings.filters), dict(os.environ), signal.getsignal(signal.SIGINT))\n"
        "before = state()\n"
        "import clframe\n"
        "assert state() == before"
    )
    assert heavy_after(code, cwd=tmp_path) == []
