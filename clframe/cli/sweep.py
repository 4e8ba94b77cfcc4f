"""``clframe sweep``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.cli.context import chosen_device
from clframe.cli.jobs import parse_jobs, parse_per_device
from clframe.cli.run import until_stopped
from clframe.errors import ConfigError, Interrupted, UnknownNameError, unknown_name
from clframe.sweep.values import parse_seeds, parse_words

if TYPE_CHECKING:
    from clframe.sweep.cells import Cell
    from clframe.sweep.driver import Launcher
    from clframe.sweep.selection import Choice
    from clframe.sweep.space import Space

NAME = "sweep"
HELP = "train every combination of values and seeds, each once"
WORDS = "CONFIG KEY=VALUE,VALUE ... --folder SWEEP"
DESCRIPTION = """\
Trains a run for every combination of values and every seed, each in a folder of SWEEP that is named by its config and
seed. The same command again continues: finished cells are not trained again, others continue from their last
checkpoint, and new values train only what is new. CONFIG is a config, as for `clframe run`, or a sweep file
(docs/sweeps.md), in which a block `select` chooses hyper-parameters on validation data before test seeds run. Values
with commas are written in brackets or quotes; seed=0..4 is seeds 0 to 4. Every config is checked before cells train.

  clframe sweep quickstart strategy=er,'er + exits' optimizer.lr=0.001,0.003 seed=0..4 --folder sweeps/lr
  clframe sweep --status sweeps/lr               table of all cells: done, running, failed, time left
  clframe report sweeps/lr                       compare all finished cells
  clframe sweep my_sweep.yaml --folder sweeps/mine --jobs 4
  clframe sweep my_sweep.yaml --folder sweeps/mine --retry
  clframe sweep my_sweep.yaml --folder /shared/mine --launcher ray --launcher-option cpus=2
  clframe sweep my_sweep.yaml --folder /shared/mine --launcher slurm --launcher-option timeout_min=240
"""
LAUNCHERS = ("local", "ray", "slurm")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--status", action="store_true", help="show the state of the sweep in SWEEP, and train nothing")
    parser.add_argument("--seed", metavar="SEEDS", help="short for seed=SEEDS")
    add_launch_options(parser)


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where cells are trained."""
    parser.add_argument("--folder", metavar="SWEEP", help="folder of the sweep")
    parser.add_argument("--retry", action="store_true", help="try cells again that have failed")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or mps; sets trainer.accelerator")
    parser.add_argument("--jobs", metavar="N", help="cells that train at a time here; auto (default) chooses N")
    parser.add_argument("--per-device", metavar="N", help="cells that train at a time on each GPU")
    parser.add_argument("--launcher", metavar="NAME", default="local", help="local (default), ray or slurm")
    parser.add_argument(
        "--launcher-option", metavar="KEY=VALUE", action="append", default=[], help="option of ray or slurm; repeatable"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors, warnings and the last table only")


def act(options: argparse.Namespace) -> int:
    """Train the cells, or show their state."""
    if options.status:
        from clframe.cli.sweep_status import show_status

        return show_status(_status_folder(options))
    return until_stopped(_train, options)


def _status_folder(options: argparse.Namespace) -> Path:
    found = [*options.words, *([options.folder] if options.folder is not None else [])]
    if len(found) != 1:
        raise ConfigError(f"--status: found {len(found)} folders; give that of one sweep")
    return Path(found[0])


def _train(options: argparse.Namespace) -> int:
    if not options.folder:
        raise ConfigError("sweep: found no --folder; give the folder of the sweep, such as --folder sweeps/lr")
    space, folder = read_space(options), Path(options.folder)
    launcher = make_launcher(options)
    return train_space(space, folder, launcher, retry=options.retry, quiet=options.quiet)


def read_space(options: argparse.Namespace) -> Space:
    """Return the values that the words of the command line give, together with those of a sweep file."""
    from clframe.sweep.file import check_selection, find_sweep
    from clframe.sweep.space import Space

    name, *words = options.words or [""]
    if not name or ("=" in name and not name.endswith((".yaml", ".yml"))):
        found = f"found '{name}' instead of a config" if name else "found no config"
        raise ConfigError(f"sweep: {found}; begin with one, such as clframe sweep quickstart")
    axes, seeds = parse_words(words)
    axes |= device_axes(options, given=axes)
    if options.seed is not None:
        if seeds:
            raise ConfigError(f"--seed: found {options.seed} together with seed=...; give one of them")
        seeds = tuple(parse_seeds(options.seed, where="--seed"))
    file = find_sweep(name)
    if file is None:
        return Space(config=name, grid=axes, seeds=seeds or (0,))
    space = file.space
    for key in axes:
        if any(key in row for row in space.rows):
            raise ConfigError(f"{key}: is in the list of {name} as well; leave it out")
    space = replace(space, grid={**space.grid, **axes}, seeds=seeds or space.seeds)
    check_selection(space)
    return space


def device_axes(options: argparse.Namespace, *, given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the values that ``--device`` sets, next to those that are given."""
    overrides = chosen_device(options.device, [f"{key}={','.join(values)}" for key, values in given.items()])
    return {key: (value,) for key, _, value in (override.partition("=") for override in overrides)}


def make_launcher(options: argparse.Namespace) -> Launcher:
    """Return the launcher that the options choose."""
    if options.launcher not in LAUNCHERS:
        raise UnknownNameError(unknown_name("launcher", options.launcher, LAUNCHERS, where="--launcher"))
    jobs = None if options.jobs is None else parse_jobs(options.jobs)
    given = parse_launcher_options(options.launcher_option)
    if options.launcher == "local":
        from clframe.cli.local import LocalLauncher

        if given:
            raise ConfigError(f"--launcher-option: found {next(iter(given))} with the launcher local; use --jobs")
        per_device = None if options.per_device is None else parse_per_device(options.per_device)
        return LocalLauncher(quiet=options.quiet, jobs=jobs, per_device=per_device)
    if options.per_device is not None:
        raise ConfigError(
            f"--per-device: found {options.per_device} with the launcher {options.launcher}; give --launcher-option "
            f"gpus=1, or a share for ray"
        )
    if options.launcher == "ray":
        from clframe.sweep.ray_launcher import RayLauncher

        if options.jobs is not None:
            raise ConfigError(
                f"--jobs: found {options.jobs} with the launcher ray, which fills the cluster; give --launcher-option "
                f"cpus=N"
            )
        return RayLauncher.of(given, say=_say(options))
    from clframe.sweep.slurm_launcher import SlurmLauncher

    return SlurmLauncher.of(given, jobs=jobs, say=_say(options))


def parse_launcher_options(words: Sequence[str]) -> dict[str, str]:
    """Parse ``--launcher-option KEY=VALUE``.

    >>> parse_launcher_options(["cpus=2", "gpus=0.5"])
    {'cpus': '2', 'gpus': '0.5'}
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not (key and equals and value) or key in found:
            raise ConfigError(f"--launcher-option: found '{word}'; give each option once, such as cpus=2")
        found[key] = value
    return found


def _say(options: argparse.Namespace) -> _Say:
    return _Say(quiet=options.quiet)


class _Say:
    """Prints lines of a launcher."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, text: str, *, error: bool = False) -> None:
        if error or not self._quiet:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)


def train_space(space: Space, folder: Path, launcher: Launcher, *, retry: bool, quiet: bool) -> int:
    """Train a sweep and print its table; returns the exit code: 0, or 2 if a cell has failed."""
    from clframe.sweep.plan import plan_cells

    if space.select is None:
        return train_cells(plan_cells(folder, space), folder, launcher, retry=retry, quiet=quiet)
    from clframe.sweep.selection import select, test_cells

    train = partial(_train_left, folder, launcher, retry, quiet)
    choices = select(folder, space, train, jobs=launcher.jobs)
    if not quiet:
        _print_choices(choices, space)
    return train_cells(test_cells(folder, space, choices), folder, launcher, retry=retry, quiet=quiet)


def train_cells(cells: Sequence[Cell], folder: Path, launcher: Launcher, *, retry: bool, quiet: bool) -> int:
    """Train cells and print their table; returns the exit code: 0, or 2 if one has failed."""
    from clframe.cli.sweep_status import print_summary

    failed = _train_left(folder, launcher, retry, quiet, cells)
    print_summary(cells)
    for cell in cells:
        if cell.key in failed and cell.key not in launcher.reported:  # it failed before, or in another process
            print(f"clframe: error: {cell.label}, seed {cell.seed}: {failed[cell.key]}", file=sys.stderr)
    if failed:
        print(f"clframe: {len(failed)} of {len(cells)} cells failed; try them again with --retry", file=sys.stderr)
    return 2 if failed else 0


def _train_left(
    folder: Path, launcher: Launcher, retry: bool, quiet: bool, cells: Sequence[Cell]
) -> dict[str, str]:  # fmt: skip
    """Train the cells that are not finished; returns the reason of each that has failed."""
    from clframe.sweep.cells import read_attempts
    from clframe.sweep.driver import run_cells

    left = [cell for cell in cells if not cell.finished()]
    skipped = [] if retry else [cell for cell in left if read_attempts(cell.sweep, cell.key).failed]
    if not quiet:
        again = "it" if len(skipped) == 1 else "them"
        failed = f", {len(skipped)} failed before and left out (--retry trains {again} again)" if skipped else ""
        print(f"{_count(cells)}, {len(cells) - len(left)} of them finished{failed}", flush=True)
    try:
        return run_cells(cells, launcher, retry=retry, on_waiting=_name_waiting)
    except KeyboardInterrupt:
        raise SweepInterrupted(folder) from None


class SweepInterrupted(Interrupted):
    """A sweep stopped by the user or by a signal."""

    def __init__(self, folder: Path) -> None:
        KeyboardInterrupt.__init__(self, "interrupted")
        self.folder = folder
        self.advice = "the same command continues the sweep"


def _name_waiting(cells: Sequence[Cell]) -> None:
    from clframe.sweep.locks import holder

    names = sorted({f"process {found.pid} on {found.host}" for c in cells if (found := holder(c.sweep, c.key))})
    print(f"waiting for {_count(cells)} that train elsewhere: {', '.join(names) or 'another process'}", flush=True)


def _count(cells: Sequence[Cell]) -> str:
    return f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"


def _print_choices(choices: Sequence[Choice], space: Space) -> None:
    from clframe.metrics.registry import METRICS
    from clframe.sweep.space import label_of
    from clframe.tables import Quantity, Table, to_text

    assert space.select is not None
    metric, keys = METRICS.get(space.select.metric), space.varied()
    rows = tuple(
        (label_of(choice.base, keys) or choice.base.get("strategy", space.config),
         label_of(found.chosen, list(found.chosen)) + (" (chosen)" if found is choice.best else ""),
         Quantity(found.value, kind=metric.kind, undefined=found.reason))
        for choice in choices for found in choice.candidates
    )  # fmt: skip
    unit = ", %" if metric.kind == "percent" else ""
    seeds = ", ".join(map(str, space.select.seeds))
    table = Table(
        name="selection", title=f"Selection on validation data, mean over seeds {seeds}",
        columns=("cell", "values", f"{metric.label}{unit}"), rows=rows,
    )  # fmt: skip
    print(f"\n{to_text(table)}\n", flush=True)
