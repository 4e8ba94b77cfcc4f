"""``clframe explain``."""

from __future__ import annotations

import argparse

from clframe.cli.context import CONFIG, add_config_options, notices, parse_config

NAME = "explain"
HELP = "show what a run would do, without training"
WORDS = "CONFIG [KEY=VALUE ...]"
DESCRIPTION = f"""\
Prints the resolved config, the experiences, the hooks of every component, the loss terms and slots, and the parameters
and MACs of the network. Nothing is trained and nothing is written.

{CONFIG}
  clframe explain quickstart
  clframe explain quickstart strategy='er + lwf(alpha=2)' backbone=mlp
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_config_options(parser)


def act(options: argparse.Namespace) -> int:
    """Print the explanation."""
    from clframe.api import explain

    with notices(quiet=False) as data_notices:
        text = explain(*parse_config(options))
        data_notices.show()
    print(text)
    return 0
