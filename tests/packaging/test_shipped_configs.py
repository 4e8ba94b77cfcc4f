"""``shipped_configs`` prefers the wheel's folder, then a checkout's, and never takes a foreign one."""

from __future__ import annotations

from pathlib import Path

import pytest

from clframe.config import files as paths
from clframe.errors import ConfigError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``clframe`` seems to be installed."""
    (tmp_path / "clframe").mkdir()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "clframe")
    return tmp_path


def test_this_checkout_or_wheel_has_the_quickstart() -> None:
    """The one config every user meets first."""
    assert (paths.shipped_configs() / "experiment" / "quickstart.yaml").is_file()


def test_a_checkout_has_them_beside_the_package(site: Path) -> None:
    """A folder ``configs`` counts with a pyproject.toml next to it."""
    (site / "configs").mkdir()
    (site / "pyproject.toml").touch()
    assert paths.shipped_configs() == site / "configs"


def test_the_package_own_folder_wins(site: Path) -> None:
    """An installed wheel is not led astray by the folder it is installed in."""
    (site / "configs").mkdir()
    (site / "pyproject.toml").touch()
    (site / "clframe" / "_configs").mkdir()
    assert paths.shipped_configs() == site / "clframe" / "_configs"


def test_a_foreign_configs_folder_is_not_taken(site: Path) -> None:
    """``site-packages/configs`` of another package is not a checkout."""
    (site / "configs").mkdir()
    with pytest.raises(ConfigError, match=r"^configs: neither .*_configs nor .*; install clframe again$"):
        paths.shipped_configs()
