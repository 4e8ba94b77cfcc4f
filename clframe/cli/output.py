"""Output of verbs that print a table or write it as JSON and CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def write_found(
    options: argparse.Namespace, *, as_json: Callable[[], str], as_csv: Callable[[], str], shown: Callable[[], str]
) -> None:
    """Write the files of ``--json`` and ``--csv``, or one of them to the standard output (``-``); otherwise print.

    Args:
        options: Those of the verb.
        as_json: Renders JSON.
        as_csv: Renders CSV.
        shown: Renders the text to print.
    """
    from clframe.files import write_atomically

    for target, render in ((options.json, as_json), (options.csv, as_csv)):
        if target == "-":
            sys.stdout.write(render())
        elif target is not None:
            write_atomically(target, render())
    if "-" not in (options.json, options.csv):
        print(shown())
