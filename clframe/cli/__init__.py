"""The command line: one module per verb.

Nothing heavy is imported until a verb runs, so that ``clframe --help`` is fast. A user error is one line on stderr,
``clframe: error: <where>: <what was found>; <what to do>``, and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, TextIO, cast

from clframe import __version__
from clframe.cli import analyze as analyze
from clframe.cli import (
    card,
    check,
    evaluate,
    exits,
    explain,
    export,
    extend,
    latency,
    listing,
    moefy,
    predict,
    report,
    reproduce,
    run,
    runs,
    sweep,
)
from clframe.errors import ClframeError, ConfigError, ConfigErrors, UnknownNameError, nearest, unknown_name
from clframe.own_code import allow_imports
from clframe.printable import PrintableStream, printable
from clframe.progress import hide_progress

_DESCRIPTION = """\
Continual learning with accounting: train on a stream of experiences, compose strategies in one line, and report
accuracy, forgetting and the cost of every prediction.

  clframe run quickstart                               split digits in a minute, no download
  clframe run quickstart strategy='er + lwf(alpha=2)'  use another strategy
  clframe run quickstart components.er.memory=50       change an option
  clframe run quickstart --seeds 0..4                  five seeds, mean and standard deviation
  clframe sweep quickstart strategy=er,lwf seed=0..4 --folder sweeps/first   every combination, each once
  clframe reproduce digits                             train a published table again and compare
  clframe runs                                         list runs with their accuracy, cost and state
  clframe extend RUN benchmark.path=new_photos         learn new classes on top of a finished run
  clframe predict RUN photos                           classify files, folders or texts
  clframe export RUN --format onnx                     write the model as ONNX, torch.export or safetensors
  clframe card RUN                                     write a model card with weights and config
  clframe evaluate RUN                                 measure again, or on other data
  clframe exits RUN --budget 0.4                       solve exit thresholds again, without training
  clframe report runs/quickstart                       HTML page, tables and figures of finished runs
  clframe latency RUN                                  time predictions up to each exit
  clframe analyze sparsity RUN                         measure activation sparsity
  clframe moefy RUN                                    convert dense layers to experts
  clframe explain quickstart                           show what a run would do, without training
  clframe list strategies                              list what can be used
  clframe check                                        check the installation
"""

_VERBS = (
    run, runs, sweep, reproduce, extend, predict, evaluate, exits, export, card, report, latency, analyze, moefy,
    explain, listing, check,
)  # fmt: skip
_ALIASES = {"analyse": analyze.NAME}
"""Former or British spellings of verbs: accepted, but not listed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with contextlib.redirect_stdout(cast(TextIO, PrintableStream(sys.stdout))):
            code = _act(given)
        sys.stdout.flush()
        return code
    except ClframeError as error:
        if "--debug" in given:
            traceback.print_exc()
        for problem in error.problems if isinstance(error, ConfigErrors) else (error,):
            print(f"clframe: error: {printable(' '.join(str(problem).splitlines()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nclframe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): redirect stdout, so that the flush at exit does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors: one line without usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.split()[-1]}: {message}; see {self.prog} --help")


def _act(given: list[str]) -> int:
    names = tuple(verb.NAME for verb in _VERBS)
    verb = next((word for word in given if not word.startswith("-")), None)
    if verb in _ALIASES:
        given = [_ALIASES.get(word, word) if i == given.index(verb) else word for i, word in enumerate(given)]
        verb = _ALIASES[verb]
    if verb is not None and verb not in names:
        raise UnknownNameError(unknown_name("verb", verb, names, where="clframe"))
    parser = _parser(verb)
    # The rest: words after an option, which argparse does not collect, and unknown options.
    options, rest = parser.parse_known_args(given)
    for word in rest:
        if word.startswith("-"):
            _unknown_option(word, parser if verb is None else options.parser)
    if verb is None:
        parser.print_help()
        return 0
    options.words += rest
    if getattr(options, "output", None) == "":
        raise ConfigError("--output: found ''; give a folder")
    with hide_progress(getattr(options, "quiet", False)), allow_imports(options.allow_imports):
        return int(options.act(options))


def _unknown_option(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    known = sorted(set(re.findall(r"--[a-z_-]+", parser.format_help())))
    name = word.partition("=")[0]
    close = nearest(name, [option for option in known if option != "--help"])
    advice = f"did you mean '{close}'?" if close else f"options are {', '.join(known)}"
    raise UnknownNameError(f"{parser.prog.split()[-1]}: unknown option '{name}'; {advice}")


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the chosen verb alone: those of all verbs take 20 milliseconds."""
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
        made.add_argument(
            "--allow-imports", metavar="PACKAGE", action="append", default=[],
            help="let configs name code of this package of yours by dotted path, such as PACKAGE.nets.wide",
        )  # fmt: skip
        if chosen == verb.NAME:
            verb.add_options(made)
        made.set_defaults(parser=made, act=verb.act)
    return parser
