"""``clframe reproduce``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from clframe.cli.run import until_stopped
from clframe.cli.sweep import add_launch_options, device_axes, make_launcher, train_cells
from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.sweep.values import parse_words

NAME = "reproduce"
HELP = "train rows of a published table again and compare the numbers"
WORDS = "TABLE[:ROW] [KEY=VALUE ...]"
DESCRIPTION = """\
Trains the runs of a table of docs/results.md again, or of one of its rows, and compares the means over seeds with the
stored numbers. TABLE is a sweep file with a block `expected`: a name in configs/sweep or a file. KEY=VALUE overrides
say where data are or what trains. The same command again continues; finished runs are not trained again.
The exit code is 0 if every number is within its tolerance, and 1 if not.

  clframe reproduce digits
  clframe reproduce digits:er --jobs 2
  clframe reproduce split_mnist:er benchmark.data_dir=DIR --folder sweeps/mnist
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_launch_options(parser)


def act(options: argparse.Namespace) -> int:
    """Train and compare."""
    return until_stopped(_reproduce, options)


def _reproduce(options: argparse.Namespace) -> int:
    from clframe.config.files import YAML, known_configs
    from clframe.sweep.cells import label_cells
    from clframe.sweep.expected import compare, comparison_table, read_expected, restrict
    from clframe.sweep.file import GROUP, find_sweep
    from clframe.sweep.plan import check_settings, record_cells
    from clframe.tables import to_text

    word, *words = options.words or [""]
    table, _, row = word.partition(":")
    if not table:
        raise ConfigError("reproduce: found no table; give one, such as clframe reproduce digits")
    # A config may have the name of its table.
    file = find_sweep(table if "/" in table or table.endswith(YAML) else f"{GROUP}/{table}")
    if file is None:
        tables = [name.removeprefix(f"{GROUP}/") for name in known_configs(GROUP)]
        raise UnknownNameError(unknown_name("table", table, tables, where="reproduce"))
    if file.space.select is not None:
        raise ConfigError(f"{file.path}: has a selection, whose outcome may differ; train it with clframe sweep")
    expected = read_expected(file)
    rows = [expected.row(row)] if row else list(expected.rows)
    axes, seeds = parse_words(words)
    if seeds:
        raise ConfigError("seed: found seeds, but stored numbers are means over those of the table; leave it out")
    space = replace(file.space, grid={**file.space.grid, **axes, **device_axes(options, given=axes)})
    folder, launcher = Path(options.folder or Path("reproduced") / Path(table).stem), make_launcher(options)
    parts = [restrict(space, one.setting) for one in rows]
    checked = [check_settings(part.config, part.settings()) for part in parts]
    cells = [record_cells(folder, each, seeds=part.seeds, keys=space.varied())
             for each, part in zip(checked, parts, strict=True)]  # fmt: skip
    every = label_cells(list({cell.key: cell for row_cells in cells for cell in row_cells}.values()))
    code = train_cells(every, folder, launcher, retry=options.retry, quiet=options.quiet)
    found = [number for one, row_cells in zip(rows, cells, strict=True) if all(cell.finished() for cell in row_cells)
             for number in compare(one, row_cells, expected.tolerance)]  # fmt: skip
    if found:
        print(f"\n{to_text(comparison_table(found, title=f'Compared with {expected.source}'))}")
    return code or int(not all(one.reproduced for one in found))
