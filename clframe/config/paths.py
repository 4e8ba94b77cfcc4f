"""Where the configs that come with clframe are."""

from __future__ import annotations

from pathlib import Path

from clframe.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> Path:
    """The folder of the YAML files that come with clframe.

    An installed wheel carries them inside the package, as ``clframe/_configs``; a checkout, also one
    installed with ``pip install -e``, has them live in ``configs`` beside it. Raises
    :class:`~clframe.errors.ConfigError` where neither is there.

    >>> shipped_configs().is_dir()
    True
    """
    installed = _PACKAGE / "_configs"
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent
    # site-packages may hold a foreign "configs": only a folder beside our pyproject.toml is ours.
    if (checkout / "configs").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout / "configs"
    raise ConfigError(
        f"configs: neither {installed} nor a checkout's {checkout / 'configs'} exists; install clframe again"
    )
