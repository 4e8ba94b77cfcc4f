"""What there is to choose from, one line each; what is asked for by name, with its options."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clframe.config.files import known_configs
from clframe.core import COMPONENTS
from clframe.data import SOURCES
from clframe.nn import BACKBONES
from clframe.reporting.docstrings import Described, described


def listing(what: str, *, filter: str = "", width: int | None = None) -> list[str]:
    """One line of every strategy, benchmark, backbone or config: its name, what it is and what it needs.

    Args:
        what: ``strategies``, ``benchmarks``, ``backbones`` or ``configs``.
        filter: A name, or else what the line or the name of an option has to contain. Where that leaves one, its
            options follow, unless it is a config.
        width: Columns of the terminal, beyond which lines are cut; None leaves them as they are.
    """
    if what == "configs":
        comments = {name: _comment(path) for name, path in known_configs().items()}
        kept = [name for name in comments if filter.lower() in f"{name} {comments[name]}".lower()]
        room = None if len(kept) == 1 else width
        return [_line(name, comments[name], "", column=max(map(len, comments)), width=room) for name in kept]
    registry: Any = {"strategies": COMPONENTS, "benchmarks": SOURCES, "backbones": BACKBONES}[what]
    entries = {name: (described(entry), entry) for name, entry in registry.items()}
    kept = [name for name in entries if name == filter.lower()] or [
        name for name, (item, _) in entries.items() if filter.lower() in _searched(name, item).lower()
    ]
    room = None if len(kept) == 1 else width
    lines = []
    for name in kept:
        item, entry = entries[name]
        lines.append(_line(name, item.summary, _needs(item, entry), column=max(map(len, entries)), width=room))
    return [*lines, *_options(entries[kept[0]][0], width=width)] if len(kept) == 1 else lines


def _searched(name: str, item: Described) -> str:
    options = [f"{option.name}={option.default or ''}" for option in item.options]
    return " ".join([name, item.summary, *options])


def _needs(item: Described, entry: Callable[..., Any]) -> str:
    """What is no good without something else: a component without a memory, a data set without its path."""
    needs = [f"{option.name}=..." for option in item.options if option.default is None]
    if getattr(entry, "needs_memory", False):
        needs.insert(0, "a memory")
    return f" [needs {', '.join(needs)}]" if needs else ""


def _line(name: str, sentence: str, needs: str, *, column: int, width: int | None) -> str:
    """``name  sentence [needs ...]``, the sentence cut so that the line fits ``width``."""
    start, sentence = f"{name:<{column}}  ", sentence.replace("``", "")
    room = None if width is None else max(width - len(start) - len(needs), 20)
    if room is not None and len(sentence) > room:
        sentence = sentence[: room - 3].rstrip(" ,;:") + "..."
    return f"{start}{sentence}{needs}".rstrip()


def _options(item: Described, *, width: int | None) -> list[str]:
    """Every option with its default, type and text, indented and folded."""
    lines: list[str] = []
    for option in item.options:
        default = "..." if option.default is None else option.default
        text = f"{option.name}={default}  ({option.kind}) {option.text.replace('``', '')}"
        lines += textwrap.wrap(
            text, min(width or 100, 100), initial_indent="  ", subsequent_indent=6 * " ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines


def _comment(path: Path) -> str:
    """The comment that a config begins with."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # running it will say what is wrong with it
        return ""
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
