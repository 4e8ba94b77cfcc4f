"""Output of verbs that print a table or write it as JSON and CSV."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from clframe.errors import ConfigError
from clframe.options import format_value


def check_files(options: argparse.Namespace, *names: str) -> None:
    """Refuse files that could not be written, before any work.

    Args:
        options: Those of the verb.
        names: The options that name files, without dashes; ``-`` is the standard output.

    Raises:
        ConfigError: No name, a folder, or one file for two options.
        RunFolderError: A folder that does not exist or cannot be written.
    """
    from clframe.files import require_writable

    seen: dict[str, str] = {}
    for name in names:
        file = getattr(options, name)
        if file is None:
            continue
        if not file or os.path.isdir(file):
            raise ConfigError(f"--{name}: found {format_value(file)}; give a file, or - for the standard output")
        place = file if file == "-" else os.path.realpath(file)
        if place in seen:
            raise ConfigError(f"--{seen[place]}: found {file}, and --{name} too; write one of them to another file")
        seen[place] = name
        folder = Path(file).parent
        if file != "-" and not folder.is_dir():
            raise ConfigError(f"--{name}: no folder {folder}; create it, or give another file")
        if file != "-":
            require_writable(folder, where=f"--{name}")


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
