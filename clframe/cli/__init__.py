"""The command line: one module for each verb.

Nothing heavy is imported before a verb is known, so ``clframe --help`` answers at once. Whatever is wrong
with a call is one line on stderr, ``clframe: error: <where>: <what was found>; <what to do>``, and exit
code 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from clframe import __version__
from clframe.cli import analyze as analyze
from clframe.cli import explain, latency, listing, moefy, report, run
from clframe.errors import ClframeError, ConfigError, UnknownNameError, nearest, unknown_name

_DESCRIPTION = """\
Train a model class by class, compose strategies in one line, and know at the end what it forgot and what
every prediction costs.

  clframe run quickstart                               split digits, a minute, nothing downloaded
  clframe run quickstart strategy='er + lwf(alpha=2)'  another strategy
  clframe run quickstart components.er.memory=50       another option
  clframe run quickstart --seeds 0..4                  five seeds, mean and deviation
  clframe report runs/quickstart                       runs as a page, tables and figures
  clframe latency RUN                                  how long its predictions take, as far as each exit
  clframe analyze sparsity RUN                         how sparse its activations are and may become
  clframe moefy RUN                                    dense to experts, accuracy against cost
  clframe explain quickstart                           what would happen, before any training
  clframe list strategies                              what there is
"""

_VERBS = (run, report, latency, analyze, moefy, explain, listing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _act(given)
        sys.stdout.flush()
        return code
    except ClframeError as error:
        if "--debug" in given:
            traceback.print_exc()
        print(f"clframe: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "; go on with clframe run --resume RUN" if "run" in given else ""
        print(f"\nclframe: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read has gone (`| head`): nothing is lost, and the last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.split()[-1]}: {message}; see {self.prog} --help")


def _act(given: list[str]) -> int:
    parser = _parser()
    names = tuple(verb.NAME for verb in _VERBS)
    verb = next((word for word in given if not word.startswith("-")), None)
    if verb is not None and verb not in names:
        raise UnknownNameError(unknown_name("verb", verb, names, where="clframe"))
    # The rest: words behind an option, which argparse leaves alone, and options that no one knows.
    options, rest = parser.parse_known_args(given)
    for word in rest:
        if word.startswith("-"):
            _unknown_option(word, parser if verb is None else options.parser)
    if verb is None:
        parser.print_help()
        return 0
    options.words += rest
    return int(options.act(options))


def _unknown_option(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    known = sorted(set(re.findall(r"--[a-z_-]+", parser.format_help())))
    name = word.partition("=")[0]
    close = nearest(name, [option for option in known if option != "--help"])
    advice = f"did you mean '{close}'?" if close else f"options are {', '.join(known)}"
    raise UnknownNameError(f"{parser.prog.split()[-1]}: unknown option '{name}'; {advice}")


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="clframe", description=_DESCRIPTION, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"clframe {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in _VERBS:
        made = verbs.add_parser(
            verb.NAME, help=verb.HELP, description=verb.DESCRIPTION, formatter_class=form, allow_abbrev=False,
            usage=f"clframe {verb.NAME} {verb.WORDS} [options]",
        )  # fmt: skip
        made.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.add_options(made)
        made.set_defaults(parser=made, act=verb.act)
    return parser
