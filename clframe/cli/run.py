"""``clframe run``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.cli.board import Board
from clframe.cli.context import CONFIG, Notices, add_config_options, notices, parse_config, parse_seeds
from clframe.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from clframe.build import Setup
    from clframe.results import Result

NAME = "run"
HELP = "train and evaluate on every experience of a benchmark"
WORDS = "CONFIG [KEY=VALUE ...]"
DESCRIPTION = f"""\
{CONFIG}Results, checkpoints, log.txt, metrics.csv and TensorBoard files are written to a new folder under ./runs.
With --folder they are written to that folder, and the same command again continues an unfinished run in it.

  clframe run quickstart trainer.epochs=3 optimizer.lr=0.01
  clframe run quickstart backbone=mlp benchmark.experiences=2
  clframe run quickstart --tensorboard
  clframe run my.yaml --seed 3 --device cuda --output results
  clframe run my.yaml --folder runs/mine
  clframe run --resume runs/quickstart/20260101-120000-seed0
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_config_options(parser)
    parser.add_argument("--seeds", metavar="A..B", help="run every seed from A to B, or of a list such as 0,3,7")
    parser.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    parser.add_argument("--folder", metavar="DIR", help="folder of this run; the same command again continues it")
    parser.add_argument("--resume", metavar="RUN", help="resume the run in this folder")
    parser.add_argument("--deterministic", action="store_true", help="short for trainer.deterministic=true (default)")
    parser.add_argument("--tensorboard", action="store_true", help="show the run in TensorBoard while it trains")
    parser.add_argument("--quiet", action="store_true", help="print only the final average accuracy")


def act(options: argparse.Namespace) -> int:
    """Train; print tables."""
    return until_stopped(_train, options)


def until_stopped(train: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Call a verb that trains; returns its exit code, or 128 + signal after one that stopped it, with advice."""
    with StopSignals() as signals:
        try:
            return train(options)
        except Interrupted as stop:
            print(f"\nclframe: interrupted; {stop.advice}", file=sys.stderr)
        except KeyboardInterrupt:  # before a run folder was made
            print("\nclframe: interrupted", file=sys.stderr)
        return 128 + signals.received


class StopSignals:
    """Turns SIGTERM, SIGHUP and SIGUSR1 into a KeyboardInterrupt, so that they stop a run as cleanly as Ctrl-C.

    While it trains, a run handles them itself and saves first; see :mod:`clframe.training.stopping`.

    Signals that are ignored, as under nohup, stay ignored.
    """

    def __init__(self) -> None:
        self.received: int = signal.SIGINT
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python sets handlers in the main thread only
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):  # Windows has only the first
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.received = number
        raise KeyboardInterrupt


def _train(options: argparse.Namespace) -> int:
    if options.resume is not None:
        _refuse_with_resume(options)
        with notices(quiet=options.quiet) as data_notices, _board(options) as board:
            results = [_run(options, data_notices, board, resume=options.resume)]
        _print_summary(results, options)
        return 0
    if options.seeds is not None and options.seed is not None:
        raise ConfigError(f"--seeds: found {options.seeds} together with --seed {options.seed}; give one of them")
    _check_folder(options)
    config, overrides = parse_config(options)
    if options.deterministic:
        overrides.append("trainer.deterministic=true")
    seeds = [] if options.seeds is None else [[f"seed={seed}"] for seed in parse_seeds(options.seeds)]
    with notices(quiet=options.quiet) as data_notices, _board(options) as board:
        results = [
            _run(
                options, data_notices, board, config=config, overrides=[*overrides, *seed], output=options.output,
                folder=options.folder,
            )
            for seed in seeds or [[]]
        ]
    _print_summary(results, options)
    return 0


def _refuse_with_resume(options: argparse.Namespace) -> None:
    found = [*options.words]
    found += [f"--{o}" for o in ("seed", "seeds", "output", "folder", "device") if getattr(options, o) is not None]
    found += ["--deterministic"] if options.deterministic else []
    if found:
        raise ConfigError(f"--resume: found {found[0]} as well; leave it out, a resumed run uses its own config")
    if not options.resume:
        raise ConfigError("--resume: found ''; give the run folder that a run printed")


def _check_folder(options: argparse.Namespace) -> None:
    if options.folder is None:
        return
    if not options.folder:
        raise ConfigError("--folder: found ''; give a folder for the run")
    for other, reason in (("seeds", "a folder holds one run"), ("output", "both say where the run is written")):
        if getattr(options, other) is not None:
            raise ConfigError(f"--folder: found --{other} as well; leave one of them out, since {reason}")


def _board(options: argparse.Namespace) -> Board:
    return Board(wanted=options.tensorboard, echo=None if options.quiet else partial(print, flush=True))


def _run(options: argparse.Namespace, data_notices: Notices, board: Board, **arguments: Any) -> Result:
    from clframe.api import run

    def begin(setup: Setup) -> None:
        # An extended run has its own numbers of classes, which are not those of its sources.
        data_notices.show(least=logging.WARNING if setup.config.earlier else logging.NOTSET)
        board.show(setup.config, resume=options.resume or options.folder)

    result = run(**arguments, on_built=begin, on_evaluated=None if options.quiet else print_progress)
    if not options.quiet:
        print_tables(result)
    return result


def print_tables(result: Result) -> None:
    """Print accuracies, exits and metrics of a finished run."""
    from clframe.report.terminal import accuracy_text, exits_text, summary_text

    print("\n" + "\n\n".join(filter(None, (accuracy_text(result), exits_text(result), summary_text(result)))))


def print_progress(progress: Any) -> None:
    """Print the accuracies after an experience; those that were not evaluated are left out of the mean."""
    tally, index = progress.tallies[-1], progress.finished - 1
    seen = [a for j, a in enumerate(tally.accuracy_E) if j <= index and a == a]
    count = len(tally.accuracy_E)
    gone = index + 1 - len(seen)
    print(
        f"experience {progress.finished}/{count}: {100 * sum(seen) / len(seen):5.1f} % over the experiences "
        f"so far{f' ({gone} not evaluated)' if gone else ''}, {100 * tally.accuracy_E[index]:5.1f} % on this one   "
        f"({progress.train_seconds:.1f} s training)",
        flush=True,
    )


def _print_summary(results: Sequence[Result], options: argparse.Namespace) -> None:
    if options.quiet:
        for result in results:
            print(f"{result.final_average_accuracy:.4f}")
    if len(results) > 1:
        from clframe.report.terminal import seeds_table

        print(f"\n{seeds_table(results)}")
