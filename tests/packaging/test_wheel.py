"""The wheel and the source distribution hold what a user needs, and nothing else."""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("clframe", "strategies", "configs")
STATED = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOREIGN = ("tests", "perf", "examples", "docs", ".ci")
"""Folders of the repository that no wheel holds."""


def run(command: list[str], *, cwd: Path) -> str:
    """Output of a command with nothing of this process's paths in its environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building in it leaves the repository alone."""
    folder = tmp_path_factory.mktemp("copy") / "clframe-copy"
    folder.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "_configs")
    for name in (*SHIPPED, *FOREIGN):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in STATED:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist as b; b({str(out)!r})"
    run([sys.executable, "-c", code], cwd=source)
    (archive,) = out.glob("clframe-*.tar.gz")
    with tarfile.open(archive) as packed:
        # Older patch releases have no filters, newer ones warn where none is named.
        packed.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        packed.extractall(out)
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the source distribution as an installer would."""
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip_wheel, "--wheel-dir", str(out), str(sdist)], cwd=out)
    (path,) = out.glob("clframe-*.whl")
    return zipfile.ZipFile(path)


def sources(folder: str, suffix: str) -> set[str]:
    """Files of a folder of the checkout, relative to it."""
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(f"*{suffix}")}


def test_the_wheel_holds_every_config_with_its_contents(wheel: zipfile.ZipFile) -> None:
    """``configs/a/b.yaml`` is ``clframe/_configs/a/b.yaml``, byte for byte."""
    packed = {name for name in wheel.namelist() if name.startswith("clframe/_configs/")}
    expected = sources("configs", ".yaml")
    assert "experiment/quickstart.yaml" in expected
    assert packed == {f"clframe/_configs/{name}" for name in expected}
    for name in expected:
        assert wheel.read(f"clframe/_configs/{name}") == (ROOT / "configs" / name).read_bytes()


@pytest.mark.parametrize("package", ["clframe", "strategies"])
def test_the_wheel_holds_every_module_and_says_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    """A folder without ``__init__.py`` would drop out here."""
    packed = {name for name in wheel.namelist() if name.startswith(f"{package}/") and name.endswith(".py")}
    assert packed == {f"{package}/{name}" for name in sources(package, ".py")}
    assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Two packages and the metadata: ``tests`` or ``configs`` at the top would shadow other people's."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (metadata,) = (name for name in tops if name.endswith(".dist-info"))
    assert tops == {"clframe", "strategies", metadata}
    assert not tops & set(FOREIGN)


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    """The command and the door every strategy comes through."""
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert dict(points["console_scripts"]) == {"clframe": "clframe.cli:main"}
    assert dict(points["clframe.components"]) == {"strategies": "strategies:COMPONENTS"}
    assert set(points.sections()) == {"console_scripts", "clframe.components"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    """License, floors, and the releases that must never be installed."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "clframe"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(entry.endswith("licenses/LICENSE") for entry in wheel.namelist())
    needed = metadata.get_all("Requires-Dist") or []
    assert "lightning>=2.6.4" in needed
    assert "avalanche-lib<0.7,>=0.6.0" in needed


@pytest.mark.slow
def test_the_wheel_runs_its_configs_from_an_empty_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked anywhere, ``shipped_configs`` finds the folder inside the package."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    wheel.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from clframe.config.files import shipped_configs\n"
        "print(shipped_configs())"
    )
    found = Path(run([sys.executable, "-c", code], cwd=empty).strip())
    assert found == site.resolve() / "clframe" / "_configs"
    assert (found / "experiment" / "quickstart.yaml").is_file()


def test_an_editable_install_is_a_plain_path_entry(source: Path, tmp_path: Path) -> None:
    """One ``.pth`` line, no import hook, no second copy of the configs."""
    code = f"from setuptools.build_meta import build_editable as b; b({str(tmp_path)!r})"
    run([sys.executable, "-c", code], cwd=source)
    (path,) = tmp_path.glob("clframe-*.whl")
    with zipfile.ZipFile(path) as editable:
        files = [name for name in editable.namelist() if ".dist-info/" not in name]
        assert len(files) == 1
        assert files[0].endswith(".pth")
        assert editable.read(files[0]).decode().strip() == str(source)
    assert not (source / "clframe" / "_configs").exists()
