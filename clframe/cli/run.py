"""``clframe run``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.cli.board import Board
from clframe.cli.context import (
    CONFIG,
    Notices,
    add_config_options,
    notices,
    parse_config,
    parse_seeds,
    progress_line,
)
from clframe.cli.jobs import parse_jobs
from clframe.cli.signals import StopSignals
from clframe.errors import ConfigError, Interrupted
from clframe.lazy_imports import without_collection
from clframe.own_code import import_options

if TYPE_CHECKING:
    from clframe.build import Setup
    from clframe.results import Result

NAME = "run"
HELP = "train and evaluate on every experience of a benchmark"
WORDS = "CONFIG [KEY=VALUE ...]"
DESCRIPTION = f"""\
{CONFIG}Results, checkpoints, log.txt, metrics.csv and TensorBoard files are written to a new folder under ./runs.
The folder is called by strategy, seed and time, such as runs/quickstart/er+lwf-seed0-20260101-120000.
With --folder they are written to that folder, and the same command again continues an unfinished run in it.
With --jobs the runs of several seeds are trained side by side, in separate processes with their share of the
cores and of the GPU's memory.

  clframe run quickstart trainer.epochs=3 optimizer.lr=0.01
  clframe run quickstart backbone=mlp benchmark.experiences=2
  clframe run quickstart --tensorboard
  clframe run quickstart --seeds 0..7 --jobs auto
  clframe run my.yaml --seed 3 --device cuda --output results
  clframe run my.yaml --folder runs/mine
  clframe run --resume runs/quickstart/er+lwf-seed0-20260101-120000
  clframe run --resume runs/quickstart/er+lwf-seed0-20260101-120000 trainer.devices=1
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_config_options(parser)
    parser.add_argument("--seeds", metavar="A..B", help="run every seed from A to B, or of a list such as 0,3,7")
    parser.add_argument("--jobs", metavar="N", help="train N seeds of --seeds at a time; auto chooses N")
    parser.add_argument("--name", metavar="NAME", help="name of the experiment, whose runs are in runs/NAME; sets name")
    parser.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    parser.add_argument("--folder", metavar="DIR", help="folder of this run; the same command again continues it")
    parser.add_argument("--resume", metavar="RUN", help="resume the run in this folder")
    parser.add_argument(
        "--deterministic", action="store_true", help="short for trainer.deterministic=true (the default except on CUDA)"
    )
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


def _train(options: argparse.Namespace) -> int:
    if options.resume is not None:
        _refuse_with_resume(options)
        with notices(quiet=options.quiet) as data_notices, _board(options) as board:
            results = [_run(options, data_notices, board, resume=options.resume, overrides=options.words)]
        _print_summary(results, options)
        return 0
    if options.seeds is not None and options.seed is not None:
        raise ConfigError(f"--seeds: found {options.seeds} together with --seed {options.seed}; give one of them")
    jobs = None if options.jobs is None else parse_jobs(options.jobs)
    if options.jobs is not None and options.seeds is None:
        raise ConfigError(f"--jobs: found {options.jobs} without --seeds; add the seeds, such as --seeds 0..3")
    _check_folder(options)
    config, overrides = parse_config(options)
    if options.name is not None:
        overrides.append(f"name={json.dumps(options.name, ensure_ascii=False)}")  # 2024 is text, too
    if options.deterministic:
        overrides.append("trainer.deterministic=true")
    if options.jobs is not None:
        return _train_side_by_side(options, config, overrides, jobs=jobs)
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


def _train_side_by_side(options: argparse.Namespace, config: str, overrides: Sequence[str], *, jobs: int | None) -> int:
    from dataclasses import replace

    from clframe.cli.side_by_side import SideBySide, plan_runs
    from clframe.config.load import load_config

    seeds = parse_seeds(options.seeds)
    typed = load_config(config, [*overrides, f"seed={seeds[0]}"])
    if options.output is not None:
        typed = replace(typed, output=options.output)
    rest = _without_seeds(options, config, overrides)
    with _board(options) as board:
        board.show(typed)
        runs = SideBySide(config, overrides, output=options.output, quiet=options.quiet, rest=rest)
        chosen = plan_runs(runs, typed, seeds=seeds, jobs=jobs)
        if not options.quiet:
            print(chosen.reason, flush=True)
        found = runs.run(seeds, chosen)
    from clframe.results import Result

    _print_summary([Result.from_json(folder / "results.json") for folder in found.values() if folder], options)
    return 2 if None in found.values() else 0


def _without_seeds(options: argparse.Namespace, config: str, overrides: Sequence[str]) -> list[str]:
    """The command that was given, without its seeds."""
    command = ["clframe", "run", config, *overrides, "--jobs", options.jobs]
    command += [] if options.output is None else ["--output", options.output]
    command += import_options()
    return command + ["--quiet"] * options.quiet + ["--tensorboard"] * options.tensorboard


def _refuse_with_resume(options: argparse.Namespace) -> None:
    from clframe.config.typed import PLACEMENT

    found = [word for word in options.words if word.partition("=")[0] not in PLACEMENT]
    names = ("seed", "seeds", "jobs", "name", "output", "folder", "device")
    found += [f"--{name}" for name in names if getattr(options, name) is not None]
    found += ["--deterministic"] if options.deterministic else []
    if found:
        # Other devices are the only override.
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
    with without_collection():
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
    from clframe.report.terminal import result_text

    print("\n" + result_text(result))


def print_progress(progress: Any) -> None:
    """Print the accuracies after an experience."""
    print(progress_line(progress), flush=True)


def _print_summary(results: Sequence[Result], options: argparse.Namespace) -> None:
    if options.quiet:
        for result in results:
            print(f"{result.final_average_accuracy:.4f}")
    if len(results) > 1:
        from clframe.report.terminal import seeds_table

        print(f"\n{seeds_table(results)}")
