"""The command line: ``clframe run``, ``report``, ``explain`` and ``list``.

Nothing heavy is imported before a verb is known, so ``clframe --help`` answers at once. Whatever is wrong
with a call is one line on stderr, ``clframe: error: <where>: <what was found>; <what to do>``, and exit
code 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from clframe import __version__
from clframe.errors import ClframeError, ConfigError, UnknownNameError, nearest, unknown_name

if TYPE_CHECKING:
    from clframe.reporting.results import Result

_DESCRIPTION = """\
Train a model class by class, compose strategies in one line, and know at the end what it forgot and what
every prediction costs.

  clframe run quickstart                               split digits, a minute, nothing downloaded
  clframe run quickstart strategy='er + lwf(alpha=2)'  another strategy
  clframe run quickstart components.er.memory=50       another option
  clframe run quickstart --seeds 0..4                  five seeds, mean and deviation
  clframe report runs/quickstart                       runs as a page, tables and figures
  clframe explain quickstart                           what would happen, before any training
  clframe list strategies                              what there is
"""

_CONFIG = """\
CONFIG is a name of `clframe list configs`, or a YAML file of yours; files in ./configs/experiment are found
by name. KEY=VALUE changes one key: lists and scalars replace, mappings merge; benchmark=NAME and
backbone=NAME take another file of that group.
"""

_RUN = f"""\
{_CONFIG}Results, checkpoints, metrics.csv and TensorBoard files go to a folder of their own under ./runs.

  clframe run quickstart trainer.epochs=3 optimizer.lr=0.01
  clframe run quickstart backbone=mlp benchmark.experiences=2
  clframe run my.yaml --seed 3 --device cuda --output results
  clframe run --resume runs/quickstart/20260101-120000-seed0
"""

_REPORT = """\
Writes report.html, one page that needs no network, and the same as tables (CSV, Markdown, LaTeX) and figures
(SVG, PNG) to RUN/report.

RUN is a run folder, or a folder above some: then all finished runs below it. Runs that differ in their seed only
are one group: mean and deviation. Groups are set against the first run given: paired differences over common
seeds with 95 % confidence intervals, cost at equal accuracy, Pareto front. Runs that cannot be compared, for other
class orders or splits, are marked and not subtracted; other benchmarks are refused.

  clframe report runs/quickstart/20260101-120000-seed0       one run
  clframe report runs/quickstart                             all of an experiment
  clframe report runs/er runs/lwf --output comparison        two, er as the base
  clframe report runs/quickstart/20260101-120000-seed0 --watch
"""

_EXPLAIN = f"""\
Prints the resolved config, who learns what when, who acts where in the timetable, the loss terms, slots,
parameters and MACs. Nothing is trained and nothing is written.

{_CONFIG}
  clframe explain quickstart
  clframe explain quickstart strategy='er + lwf(alpha=2)' backbone=mlp
"""

_LIST = """\
One line each: name, what it is, what it needs. FILTER is a name, whose options are then shown as well, or a word
that lines or options have to contain.

  clframe list strategies
  clframe list strategies lwf
  clframe list configs backbone
"""

_VERBS = ("run", "report", "explain", "list")
_LISTS = ("strategies", "benchmarks", "backbones", "configs")
_DEVICES = ("cpu", "cuda", "gpu", "mps", "auto")


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
        print("\nclframe: interrupted; go on with clframe run --resume RUN", file=sys.stderr)
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
    verb = next((word for word in given if not word.startswith("-")), None)
    if verb is not None and verb not in _VERBS:
        raise UnknownNameError(unknown_name("verb", verb, _VERBS, where="clframe"))
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
    known = sorted(set(re.findall(r"--[a-z]+", parser.format_help())))
    name = word.partition("=")[0]
    close = nearest(name, [option for option in known if option != "--help"])
    advice = f"did you mean '{close}'?" if close else f"options are {', '.join(known)}"
    raise UnknownNameError(f"{parser.prog.split()[-1]}: unknown option '{name}'; {advice}")


def _parser() -> argparse.ArgumentParser:
    def verb(name: str, *, help: str, description: str, words: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=help, description=description, usage=f"clframe {name} {words} [options]",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        made.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made.set_defaults(parser=made)
        return made

    parser = _Parser(
        prog="clframe", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"clframe {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    words = "CONFIG [KEY=VALUE ...]"
    run = verb("run", help="train and evaluate on every experience of a benchmark", description=_RUN, words=words)
    _config_options(run)
    run.add_argument("--seeds", metavar="A..B", help="run every seed from A to B, or a list 0,3,7")
    run.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    run.add_argument("--quiet", action="store_true", help="print only the final average accuracy")
    run.set_defaults(act=_act_run)

    report = verb("report", help="one page, tables and figures of runs", description=_REPORT, words="RUN [RUN ...]")
    report.add_argument("--output", metavar="DIR", help="folder to write to (default: RUN/report)")
    report.add_argument("--watch", action="store_true", help="write it again while a run goes on, until it is finished")
    report.set_defaults(act=_act_report)

    explain = verb("explain", help="what a run would do, before any training", description=_EXPLAIN, words=words)
    _config_options(explain)
    explain.set_defaults(act=_act_explain)

    listing = verb(
        "list", help="strategies, benchmarks, backbones or configs there are", description=_LIST,
        words=f"{{{','.join(_LISTS)}}} [FILTER]",
    )  # fmt: skip
    listing.set_defaults(act=_act_list)
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", help="short for seed=N")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps; sets trainer.accelerator")


def _act_run(options: argparse.Namespace) -> int:
    from clframe.config.seeds import parse_seeds

    if options.resume is not None:
        _refuse_beside_resume(options)
        with _notices(quiet=options.quiet) as notices:
            results = [_run(options, notices, resume=options.resume)]
        _show(results, options)
        return 0
    if options.seeds is not None and options.seed is not None:
        raise ConfigError(f"--seeds: found {options.seeds} together with --seed {options.seed}; give one of them")
    config, overrides = _config(options)
    seeds = [] if options.seeds is None else [[f"seed={seed}"] for seed in parse_seeds(options.seeds)]
    with _notices(quiet=options.quiet) as notices:
        results = [
            _run(options, notices, config=config, overrides=[*overrides, *seed], output=options.output)
            for seed in seeds or [[]]
        ]
    _show(results, options)
    return 0


def _refuse_beside_resume(options: argparse.Namespace) -> None:
    found = [*options.words]
    found += [f"--{o}" for o in ("seed", "seeds", "output", "device") if getattr(options, o) is not None]
    if found:
        raise ConfigError(f"--resume: found {found[0]} beside it; leave it out, a resumed run keeps its config")
    if not options.resume:
        raise ConfigError("--resume: found ''; give the run folder that a run printed")


def _run(options: argparse.Namespace, notices: _Notices, **arguments: Any) -> Result:
    from clframe.build import run

    shown = None if options.quiet else _say_progress
    result = run(**arguments, on_built=lambda _: notices.show(), on_evaluated=shown)
    if not options.quiet:
        from clframe.reporting.tables import accuracy_table, exits_table, summary

        print("\n" + "\n\n".join(filter(None, (accuracy_table(result), exits_table(result), summary(result)))))
    return result


def _say_progress(progress: Any) -> None:
    tally, index = progress.tallies[-1], progress.finished - 1
    seen = [a for j, a in enumerate(tally.accuracy_E) if j <= index]
    count = len(tally.accuracy_E)
    print(
        f"experience {progress.finished}/{count}: {100 * sum(seen) / len(seen):5.1f} % over the experiences "
        f"so far, {100 * tally.accuracy_E[index]:5.1f} % on this one   "
        f"({progress.train_seconds:.1f} s training)",
        flush=True,
    )


def _show(results: Sequence[Result], options: argparse.Namespace) -> None:
    if options.quiet:
        for result in results:
            print(f"{result.final_average_accuracy:.4f}")
    if len(results) > 1:
        from clframe.reporting.tables import seeds_table

        print(f"\n{seeds_table(results)}")


def _act_report(options: argparse.Namespace) -> int:
    from clframe.reporting.report import write_report

    say = partial(print, flush=True)
    try:
        write_report(options.words, output=options.output, watch=options.watch, on_written=say)
    except KeyboardInterrupt:  # the page of the last look stays
        return 130
    return 0


def _act_explain(options: argparse.Namespace) -> int:
    from clframe.build import explain

    with _notices(quiet=False) as notices:
        text = explain(*_config(options))
        notices.show()
    print(text)
    return 0


class _Notices(logging.Handler):
    """What is said of the data, as plain lines on stderr, held back until nothing can refuse the call any more.

    So a call that is refused leaves warnings and its error. What several seeds have to say is said once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[logging.LogRecord] | None = []
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Hold a line back, or say it."""
        if self._held is None:
            self._say(record)
        else:
            self._held.append(record)

    def show(self, *, least: int = logging.NOTSET) -> None:
        """Say what was held back, from level ``least``, and from now on all at once."""
        held, self._held = self._held or [], None
        for record in held:
            if record.levelno >= least:
                self._say(record)

    def _say(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._said:
            self._said.add(line)
            print(line, file=sys.stderr, flush=True)


@contextmanager
def _notices(*, quiet: bool) -> Iterator[_Notices]:
    """The log of ``clframe.data`` goes to the terminal for the time of a verb; ``quiet`` lets warnings pass only."""
    logger, handler = logging.getLogger("clframe.data"), _Notices()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield handler
    finally:
        handler.show(least=logging.WARNING)
        logger.removeHandler(handler)
        logger.setLevel(level)


def _act_list(options: argparse.Namespace) -> int:
    what, *rest = options.words or [""]
    if what not in _LISTS:
        if not what:
            raise ConfigError(f"list: found nothing to list; give one of {', '.join(_LISTS)}")
        raise UnknownNameError(unknown_name("kind", what, _LISTS, where="list"))
    if len(rest) > 1:
        raise ConfigError(f"list: found '{rest[1]}' behind the filter '{rest[0]}'; give one filter")
    from clframe.reporting.listing import listing

    filter = rest[0] if rest else ""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = listing(what, filter=filter, width=width)
    if not lines:
        raise ConfigError(f"list {what}: nothing contains '{filter}'; leave the filter out to see all")
    print("\n".join(lines))
    return 0


def _config(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The config's name and all overrides, those of ``--device`` and ``--seed`` last."""
    from clframe.config.seeds import parse_seed

    name, *overrides = options.words or [""]
    if not name or ("=" in name and not name.endswith((".yaml", ".yml"))):
        found = f"found '{name}' in the place of a config" if name else "found no config"
        raise ConfigError(f"{options.verb}: {found}; begin with one, such as clframe {options.verb} quickstart")
    if options.device is not None:
        overrides += _device(options.device)
    if options.seed is not None:
        overrides.append(f"seed={parse_seed(options.seed)}")
    return name, overrides


def _device(name: str) -> list[str]:
    kind, colon, index = name.partition(":")
    indexed = kind in ("cuda", "gpu") and re.fullmatch("[0-9]{1,4}", index)
    if kind not in _DEVICES or (colon and not indexed):
        close = nearest(kind, _DEVICES) if kind not in _DEVICES else None
        advice = f"did you mean '{close}'?" if close else "give cpu, cuda, cuda:N, mps or auto"
        raise ConfigError(f"--device: found '{name}'; {advice}")
    if indexed:
        return [f"trainer.accelerator={kind}", f"trainer.devices=[{int(index)}]"]
    # An index in the config is that of a GPU.
    return [f"trainer.accelerator={kind}", *([] if kind in ("cuda", "gpu") else ["trainer.devices=1"])]
