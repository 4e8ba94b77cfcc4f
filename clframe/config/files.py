"""Where the configs that come with clframe are."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from clframe.errors import ConfigError, UnknownNameError, nearest, unknown_name

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


YAML = (".yaml", ".yml")
"""Endings that tell a file from a name."""


def config_folders() -> list[Path]:
    """Where configs are looked for: ``./configs`` first, then those that ship with clframe."""
    own = Path("configs")
    return ([own] if own.is_dir() else []) + [shipped_configs()]


def known_configs(group: str | None = None) -> dict[str, Path]:
    """Every config by ``group/name``; a file of yours hides the shipped one of the same name."""
    found: dict[str, Path] = {}
    for folder in reversed(config_folders()):
        for path in sorted(folder.glob("*/*.yaml")):
            if group is None or path.parent.name == group:
                found[f"{path.parent.name}/{path.stem}"] = path
    return dict(sorted(found.items()))


def find_config(name: str, *, group: str = "experiment", where: str = "config") -> Path:
    """The file that ``name`` means: a path ending in .yaml, ``group/name``, or a name of ``group``.

    Raises:
        UnknownNameError: No such config; the message begins with ``where`` and has the nearest name.
    """
    known = known_configs()
    if name.endswith(YAML):
        path = Path(name)
        if path.is_file():
            return path
        there = [str(other) for other in sorted(path.parent.glob("*.y*ml")) if other.is_file()]
        close = nearest(name, there) or next((key for key in known if key.endswith(f"/{path.stem}")), None)
        advice = f"did you mean '{close}'?" if close else "give a file, or a name of clframe list configs"
        raise UnknownNameError(f"{where}: no file '{name}'; {advice}")
    for key in (name, f"{group}/{name}"):
        if key in known:
            return known[key]
    for key in known:
        if name and key.endswith(f"/{name}"):
            raise UnknownNameError(f"{where}: '{name}' is no name in configs/{group}; did you mean '{key}'?")
    own = [key.removeprefix(f"{group}/") for key in known if key.startswith(f"{group}/")]
    raise UnknownNameError(unknown_name("config", name, known if "/" in name else own, where=where))


def read_yaml(path: Path) -> DictConfig:
    """A YAML file holding one mapping.

    Raises:
        ConfigError: Not readable, no valid YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_mapping = isinstance(yaml.compose(text, Loader=yaml.SafeLoader), (yaml.MappingNode, type(None)))
        loaded = OmegaConf.create(text) if is_mapping else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except Exception as error:  # what a parser may say of a broken file is not listed anywhere
        raise ConfigError(f"{path}: is no valid YAML ({reason(error)}); mend the file") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: holds no mapping of keys to values; write lines like 'strategy: er'")
    return loaded


def reason(error: Exception) -> str:
    """The point of a parser's message, which may go on for lines."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem:
        return f"{problem} in line {mark.line + 1}" if mark is not None else str(problem)
    return str(error).strip().partition("\n")[0] or type(error).__name__
