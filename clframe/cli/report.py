"""``clframe report``."""

from __future__ import annotations

import argparse
from functools import partial

NAME = "report"
HELP = "one page, tables and figures of runs"
WORDS = "RUN [RUN ...]"
DESCRIPTION = """\
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: RUN/report)")
    parser.add_argument("--watch", action="store_true", help="write it again while a run goes on, until it is finished")


def act(options: argparse.Namespace) -> int:
    """Write the report."""
    from clframe.report import write_report

    say = partial(print, flush=True)
    try:
        write_report(options.words, output=options.output, watch=options.watch, on_written=say)
    except KeyboardInterrupt:  # the page of the last look stays
        return 130
    return 0
