"""What there is to choose from, one line each."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clframe.config.files import known_configs
from clframe.core import COMPONENTS
from clframe.core.options import REQUIRED, option_types
from clframe.data import SOURCES
from clframe.nn import BACKBONES


def listing(what: str) -> list[str]:
    """Name, first sentence and options of every strategy, benchmark, backbone or config."""
    if what == "configs":
        paths = known_configs()
        width = max(map(len, paths))
        return [f"{name:<{width}}  {_comment(path)}" for name, path in paths.items()]
    registry: Any = {"strategies": COMPONENTS, "benchmarks": SOURCES, "backbones": BACKBONES}[what]
    items = registry.items()
    width = max(len(name) for name, _ in items)
    return [f"{name:<{width}}  {_sentence(entry)}{_options(entry)}" for name, entry in items]


def _sentence(entry: Callable[..., Any]) -> str:
    text = inspect.getdoc(entry) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return first


def _options(entry: Callable[..., Any]) -> str:
    options = [
        name if default is REQUIRED else f"{name}={default!r}" for name, (_, default) in option_types(entry).items()
    ]
    return f" [{', '.join(options)}]" if options else ""


def _comment(path: Path) -> str:
    """The comment that a config begins with."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # running it will say what is wrong with it
        return ""
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
