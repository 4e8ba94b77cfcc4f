"""``clframe report``."""

from __future__ import annotations

import argparse
from functools import partial

NAME = "report"
HELP = "write an HTML report with tables and figures of runs"
WORDS = "RUN [RUN ...]"
DESCRIPTION = """\
Writes report.html, a self-contained page, and its tables (CSV, Markdown, LaTeX) and figures (SVG, PNG) to RUN/report.

RUN is a run folder, or a parent folder, which selects all finished runs below it. Runs that differ only in their seed
form a group: mean and standard deviation. One table has a row per group: parameters, accuracy and its gain with a
paired 95 % confidence interval, accuracy at 25, 50, 75 and 100 % of the cost, cost at equal accuracy, forgetting.
Strategies with exits are compared with the same strategy without them, and all groups with that which most others are
comparable with; --against chooses another. Groups that are not comparable, because class orders or splits differ, are
named and not subtracted; other benchmarks are refused. Names of groups say what differs; where they would be long, they
leave out what most groups share. From 60 runs on figures of single groups are drawn for the first ones only;
--all-figures draws all.

  clframe report runs/quickstart/er+lwf-seed0-20260101-120000       one run
  clframe report runs/quickstart                             all of an experiment
  clframe report runs/er runs/lwf --output comparison        two groups
  clframe report runs --against er                           er as the reference
  clframe report runs/quickstart/er+lwf-seed0-20260101-120000 --watch
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: RUN/report)")
    parser.add_argument("--against", metavar="GROUP", help="group or strategy that the others are compared with")
    parser.add_argument("--all-figures", action="store_true", help="draw the figures of all groups, however many")
    parser.add_argument("--watch", action="store_true", help="with unfinished runs, written again until none trains")


def act(options: argparse.Namespace) -> int:
    """Write the report."""
    from clframe.report import write_report

    try:
        write_report(
            options.words, output=options.output, watch=options.watch, against=options.against,
            all_figures=options.all_figures, on_written=partial(print, flush=True),
        )  # fmt: skip
    except KeyboardInterrupt:  # the last page written is kept
        return 130
    return 0
