"""``clframe extend``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from clframe.cli.board import Board
from clframe.cli.context import chosen_device, notices, refuse_twice
from clframe.cli.run import print_progress, print_tables, until_stopped
from clframe.errors import ConfigError

if TYPE_CHECKING:
    from clframe.targets.extension import Extension

NAME = "extend"
HELP = "learn new experiences on top of a finished run"
WORDS = "RUN benchmark=NAME [KEY=VALUE ...]"
DESCRIPTION = """\
Learns new data on top of a finished run, with its strategy, buffers, teachers, exits and experts as they are, and
writes a new run folder that names its parent; the parent is not changed. Classes are matched by name: a known name adds
samples to its class, others are new classes. Accuracies cover old and new data; old data that are gone are not
evaluated. benchmark.*, trainer.* and optimizer.* can be overridden, and apply to the new experiences. New data are
learned as one experience unless benchmark.experiences or benchmark.counts says otherwise.

  clframe extend RUN benchmark=image_folder benchmark.path=new_photos
  clframe extend RUN benchmark.path=new_photos trainer.epochs=20 optimizer.lr=0.01
  clframe extend RUN benchmark.path=texts benchmark.domains=[news]      a further domain of a language model
  clframe extend RUN benchmark.path=new_photos --earlier benchmark.path=/moved/photos
  clframe run --resume EXTENDED                                         go on after an interruption
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps; sets trainer.accelerator")
    parser.add_argument("--output", metavar="DIR", help="folder for run folders (default: that of the run's config)")
    parser.add_argument(
        "--earlier", metavar="KEY=VALUE", action="append", default=[],
        help="new location of earlier data that were moved: benchmark.path=DIR or benchmark.data_dir=DIR",
    )  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", help="show the run in TensorBoard while it trains")
    parser.add_argument("--quiet", action="store_true", help="print only the final average accuracy")


def act(options: argparse.Namespace) -> int:
    """Extend; print tables."""
    return until_stopped(_extend, options)


def _extend(options: argparse.Namespace) -> int:
    run, *overrides = options.words or [""]
    if not run or run.startswith("benchmark"):
        found = f"found '{run}' instead of a run" if run else "found no run"
        raise ConfigError(f"extend: {found}; begin with a run folder, such as the one clframe run printed")
    refuse_twice("output", options.output, "output", overrides)
    overrides += chosen_device(options.device, overrides)
    quiet = options.quiet
    with (
        notices(quiet=quiet) as data_notices,
        Board(wanted=options.tensorboard, echo=None if quiet else partial(print, flush=True)) as board,
    ):
        from clframe.api import extend

        def begin(extension: Extension) -> None:
            # Without the sources' own numbers of classes, which are not those of the run.
            data_notices.show(least=logging.WARNING)
            board.show(extension.setup.config)
            if not quiet:
                print(_summary(extension), flush=True)

        result = extend(
            run, overrides, earlier=options.earlier, output=options.output, on_planned=begin,
            on_evaluated=None if quiet else print_progress,
        )  # fmt: skip
    if quiet:
        print(f"{result.final_average_accuracy:.4f}")
    else:
        print_tables(result)
    return 0


def _summary(extension: Extension) -> str:
    count = len(extension.setup.benchmark) - extension.finished
    text = bool(extension.setup.benchmark.vocabulary)
    new, known = ("domains", "text of known domains") if text else ("classes", "samples of known classes")
    lines = [f"extending {extension.parent}: {extension.finished} experiences, {count} more"]
    if extension.new:
        lines.append(f"new {new}: {', '.join(_numbered(extension, extension.new))}")
    if extension.known:
        lines.append(f"more {known}: {', '.join(_numbered(extension, extension.known))}")
    if extension.missing:
        lines.append(f"not evaluated: experience {', '.join(map(str, extension.missing))}, whose data are gone")
    return "\n".join(lines)


def _numbered(extension: Extension, names: Sequence[str]) -> list[str]:
    """Names with the numbers that the run gives to these classes."""
    known = extension.setup.benchmark.class_names
    return [f"{name} ({known.index(name)})" if known else name for name in names]
