"""``clframe list``."""

from __future__ import annotations

import argparse
import shutil
import sys

from clframe.errors import ConfigError, UnknownNameError, unknown_name

NAME = "list"
HELP = "list strategies, benchmarks, backbones or configs"
LISTS = ("strategies", "benchmarks", "backbones", "configs")
WORDS = f"{{{','.join(LISTS)}}} [FILTER]"
DESCRIPTION = """\
Prints one line each: name, summary, requirements. FILTER is a name, which also prints its options, or a text that the
line or an option must contain.

  clframe list strategies
  clframe list strategies lwf
  clframe list configs backbone
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The verb has no options."""


def act(options: argparse.Namespace) -> int:
    """Print one line per name."""
    what, *rest = options.words or [""]
    if what not in LISTS:
        if not what:
            raise ConfigError(f"list: found no kind to list; give one of {', '.join(LISTS)}")
        raise UnknownNameError(unknown_name("kind", what, LISTS, where="list"))
    if len(rest) > 1:
        raise ConfigError(f"list: found '{rest[1]}' after the filter '{rest[0]}'; give one filter")
    from clframe.report.explanation import listing

    filter = rest[0] if rest else ""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = listing(what, filter=filter, width=width)
    not_loaded = _not_loaded(what)
    if not lines:
        advice = "leave the filter out to see all" if filter else f"not loaded: {'; '.join(not_loaded)}"
        raise ConfigError(f"list {what}: nothing contains '{filter}'; {advice}")
    print("\n".join(lines))
    for reason in not_loaded:
        print(f"clframe: not loaded: {reason}", file=sys.stderr)
    return 0


def _not_loaded(what: str) -> list[str]:
    """Entry points of other packages that could not be loaded."""
    from clframe.config.files import REGISTRIES

    groups = {"strategies": ["strategy"], "benchmarks": ["benchmark"], "backbones": ["backbone"]}
    return [reason for group in groups.get(what, REGISTRIES) for reason in REGISTRIES[group].not_loaded]
