"""``clframe run``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.cli.board import Board
from clframe.cli.context import CONFIG, Notices, add_config_options, config_of, notices
from clframe.errors import ConfigError

if TYPE_CHECKING:
    from clframe.build import Parts
    from clframe.results import Result

NAME = "run"
HELP = "train and evaluate on every experience of a benchmark"
WORDS = "CONFIG [KEY=VALUE ...]"
DESCRIPTION = f"""\
{CONFIG}Results, checkpoints, metrics.csv and TensorBoard files go to a folder of their own under ./runs.

  clframe run quickstart trainer.epochs=3 optimizer.lr=0.01
  clframe run quickstart backbone=mlp benchmark.experiences=2
  clframe run quickstart --tensorboard
  clframe run my.yaml --seed 3 --device cuda --output results
  clframe run --resume runs/quickstart/20260101-120000-seed0
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_config_options(parser)
    parser.add_argument("--seeds", metavar="A..B", help="run every seed from A to B, or a list 0,3,7")
    parser.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--tensorboard", action="store_true", help="show the run in TensorBoard on localhost meanwhile")
    parser.add_argument("--quiet", action="store_true", help="print only the final average accuracy")


def act(options: argparse.Namespace) -> int:
    """Train; print tables."""
    from clframe.config.seeds import parse_seeds

    if options.resume is not None:
        _refuse_beside_resume(options)
        with notices(quiet=options.quiet) as said, _board(options) as board:
            results = [_run(options, said, board, resume=options.resume)]
        _show(results, options)
        return 0
    if options.seeds is not None and options.seed is not None:
        raise ConfigError(f"--seeds: found {options.seeds} together with --seed {options.seed}; give one of them")
    config, overrides = config_of(options)
    seeds = [] if options.seeds is None else [[f"seed={seed}"] for seed in parse_seeds(options.seeds)]
    with notices(quiet=options.quiet) as said, _board(options) as board:
        results = [
            _run(options, said, board, config=config, overrides=[*overrides, *seed], output=options.output)
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


def _board(options: argparse.Namespace) -> Board:
    return Board(wanted=options.tensorboard, say=None if options.quiet else partial(print, flush=True))


def _run(options: argparse.Namespace, said: Notices, board: Board, **arguments: Any) -> Result:
    from clframe.build import run

    def begin(parts: Parts) -> None:
        said.show()
        board.show(parts.config, resume=options.resume)

    shown = None if options.quiet else _say_progress
    result = run(**arguments, on_built=begin, on_evaluated=shown)
    if not options.quiet:
        from clframe.report.terminal import accuracy_table, exits_table, summary

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
        from clframe.report.terminal import seeds_table

        print(f"\n{seeds_table(results)}")
