"""``clframe explain``."""

from __future__ import annotations

import argparse

from clframe.cli.context import CONFIG, add_config_options, config_of, notices

NAME = "explain"
HELP = "what a run would do, before any training"
WORDS = "CONFIG [KEY=VALUE ...]"
DESCRIPTION = f"""\
Prints the resolved config, who learns what when, who acts where in the timetable, the loss terms, slots,
parameters and MACs. Nothing is trained and nothing is written.

{CONFIG}
  clframe explain quickstart
  clframe explain quickstart strategy='er + lwf(alpha=2)' backbone=mlp
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_config_options(parser)


def act(options: argparse.Namespace) -> int:
    """Print what a run would do."""
    from clframe.build import explain

    with notices(quiet=False) as said:
        text = explain(*config_of(options))
        said.show()
    print(text)
    return 0
