"""``clframe exits``."""

from __future__ import annotations

import argparse
import math

from clframe.cli.context import notices, parse_run
from clframe.errors import ConfigError

NAME = "exits"
HELP = "solve exit thresholds of a finished run again, without training"
WORDS = "RUN [benchmark.data_dir=DIR]"
DESCRIPTION = """\
Solves thresholds for budgets of MACs or for an allowed drop of accuracy with any confidence measure, on the validation
data of the run, and measures them on its test data. Nothing is trained.

  clframe exits RUN --budget 0.4                            a mean cost of 40 % of the backbone's MACs
  clframe exits RUN --budget 0.25 0.5 0.75 --measure entropy
  clframe exits RUN --drop 0.01 --solver coordinate         at most one percentage point below the last exit

The run needs exits and validation data (benchmark.validation=0.1). Writes RUN/exits/operating_points_MEASURE.json.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    add("--budget", nargs="+", default=[], metavar="SHARE", help="mean costs as shares of the backbone's MACs")
    add("--drop", nargs="+", default=[], metavar="SHARE", help="allowed drops of validation accuracy, 0.01 for 1 %%")
    add("--measure", default="max_probability", metavar="NAME",
        help="confidence measure: max_probability, entropy, margin, patience, gate, failure")  # fmt: skip
    add("--solver", default="shared", metavar="NAME", help="shared, quantiles or coordinate")
    add("--fallback", default="last", metavar="NAME", help="prediction where no exit is confident: last or confident")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    add("--output", metavar="DIR", help="folder for the JSON file (default: RUN/exits)")


def act(options: argparse.Namespace) -> int:
    """Solve, print and write."""
    run, overrides = parse_run(options, then="benchmark.KEY=VALUE")
    budgets = [_share("--budget", text) for text in options.budget]
    drops = [_share("--drop", text, least=0.0) for text in options.drop]
    for name, choices in (("solver", ("shared", "quantiles", "coordinate")), ("fallback", ("last", "confident"))):
        if getattr(options, name) not in choices:
            raise ConfigError(f"--{name}: found '{getattr(options, name)}'; give one of {', '.join(choices)}")

    from pathlib import Path

    from clframe.files import require_writable
    from clframe.progress import progress_bars
    from clframe.tables import to_text
    from clframe.targets import exit_points

    if options.output is not None:
        require_writable(Path(options.output).expanduser())
    with notices(quiet=True), progress_bars(unit="batch") as show:
        found = exit_points.solve_run(
            run, budgets=budgets, drops=drops, measure=options.measure, solver=options.solver,
            fallback=options.fallback, overrides=overrides, device=options.device, progress=show,
        )  # fmt: skip
    tables = (exit_points.points_table(found), exit_points.thresholds_table(found))
    print("\n\n".join(map(to_text, tables)))
    if advice := exit_points.hint(found):
        print(f"\n{advice}")
    command = ["clframe", NAME, *options.words, *_goal("--budget", options.budget), *_goal("--drop", options.drop),
               "--measure", options.measure, "--solver", options.solver, "--fallback", options.fallback]  # fmt: skip
    print(f"\n{exit_points.write_points(found, command=command, output=options.output)}")
    return 0


def _goal(option: str, values: list[str]) -> list[str]:
    return [option, *values] if values else []


def _share(option: str, text: str, *, least: float | None = None) -> float:
    """A number above 0, or from ``least`` on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    fine = math.isfinite(value) and (value > 0 if least is None else least <= value < 1)
    if not fine:
        wanted = "a share above 0, such as 0.4" if least is None else "a share from 0 to below 1, such as 0.01"
        raise ConfigError(f"{option}: found '{text}'; give {wanted}")
    return value
