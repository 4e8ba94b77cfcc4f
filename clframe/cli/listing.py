"""``clframe list``."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys

from clframe.errors import ConfigError, UnknownNameError, nearest

NAME = "list"
HELP = "list strategies, benchmarks, backbones, metrics and other names"
LISTS = ("strategies", "benchmarks", "backbones", "metrics", "exit-metrics", "confidence-measures", "configs")
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
        raise UnknownNameError(_unknown_kind(what))
    if len(rest) > 1:
        raise ConfigError(f"list: found '{rest[1]}' after the filter '{rest[0]}'; give one filter")
    from clframe.report.explanation import listing

    filter = rest[0] if rest else ""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = listing(what, filter=filter, width=width)
    not_loaded = _not_loaded(what)
    if not lines:
        advice = (_closest(filter, first=what) or "leave the filter out to see all") if filter else ""
        reasons = f"not loaded: {'; '.join(not_loaded)}" if not_loaded else ""
        raise ConfigError(
            f"list {what}: nothing contains '{filter}'; {'; '.join(part for part in (advice, reasons) if part)}"
        )
    print("\n".join(lines))
    for reason in not_loaded:
        print(f"clframe: not loaded: {reason}", file=sys.stderr)
    return 0


def _unknown_kind(word: str) -> str:
    """Message for a word that is not a list: it may be misspelled, or a name without its list."""
    close = nearest(word, LISTS)
    advice = f"did you mean '{close}'?" if close else _closest(word)
    return f"list: unknown kind '{word}'; {advice or 'nothing is close to it'} (known: {', '.join(LISTS)})"


def _closest(word: str, *, first: str = "") -> str:
    """Advice with the name closest to ``word`` in any list, and the command that shows it; empty if none is close.

    Args:
        word: What was given.
        first: The list in which it was looked for, whose names are preferred.
    """
    from clframe.report.explanation import names_of

    names = {kind: names_of(kind) for kind in LISTS}
    order = sorted(LISTS, key=lambda kind: kind != first)
    exact = [(kind, name) for kind in order for name in names[kind] if word.lower() in (name, name.rpartition("/")[2])]
    found = [(kind, name) for kind in order if (name := nearest(word, names[kind]))]
    near = sorted((pair for pair in found if _alike(word, pair[1]) > 0.6), key=lambda pair: -_alike(word, pair[1]))
    if exact:
        kind, name = exact[0]
        return f"'{name}' is one of the {kind}: clframe list {kind} {name}"
    if near:
        kind, name = near[0]
        return f"did you mean '{name}', one of the {kind}? clframe list {kind} {name} shows it"
    return ""


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _not_loaded(what: str) -> list[str]:
    """Entry points of other packages that could not be loaded."""
    from clframe.config.files import REGISTRIES

    groups = {"strategies": ["strategy"], "benchmarks": ["benchmark"], "backbones": ["backbone"]}
    return [reason for group in groups.get(what, REGISTRIES) for reason in REGISTRIES[group].not_loaded]
