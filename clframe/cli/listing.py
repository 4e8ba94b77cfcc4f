"""``clframe list``."""

from __future__ import annotations

import argparse
import shutil
import sys

from clframe.errors import ConfigError, UnknownNameError, unknown_name

NAME = "list"
HELP = "strategies, benchmarks, backbones or configs there are"
LISTS = ("strategies", "benchmarks", "backbones", "configs")
WORDS = f"{{{','.join(LISTS)}}} [FILTER]"
DESCRIPTION = """\
One line each: name, what it is, what it needs. FILTER is a name, whose options are then shown as well, or a word
that lines or options have to contain.

  clframe list strategies
  clframe list strategies lwf
  clframe list configs backbone
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def act(options: argparse.Namespace) -> int:
    """Print a line for each name."""
    what, *rest = options.words or [""]
    if what not in LISTS:
        if not what:
            raise ConfigError(f"list: found nothing to list; give one of {', '.join(LISTS)}")
        raise UnknownNameError(unknown_name("kind", what, LISTS, where="list"))
    if len(rest) > 1:
        raise ConfigError(f"list: found '{rest[1]}' behind the filter '{rest[0]}'; give one filter")
    from clframe.report.explanation import listing

    filter = rest[0] if rest else ""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = listing(what, filter=filter, width=width)
    if not lines:
        raise ConfigError(f"list {what}: nothing contains '{filter}'; leave the filter out to see all")
    print("\n".join(lines))
    return 0
