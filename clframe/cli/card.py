"""``clframe card``."""

from __future__ import annotations

import argparse
import sys

from clframe.errors import ConfigError

NAME = "card"
HELP = "write a model card with weights and config"
WORDS = "RUN"
DESCRIPTION = """\
Writes a folder that model hubs and clframe.load read: README.md (task, data, classes, accuracy matrix, forgetting, cost
and calibration of each exit, limits, the command to repeat the run), model.safetensors, config.yaml and model.json. The
weights hold no training data. Complete the section on intended use before passing the model on.

  clframe card RUN                                            the folder RUN/card
  clframe card RUN --output my_model --license mit
  clframe card RUN --push-to-hub USER/NAME                    upload it to a private repository

Needs the extra export; --push-to-hub needs the extra hub: pip install 'clframe[export,hub]'.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--output", metavar="DIR", help="the folder to create (default: RUN/card)")
    parser.add_argument("--license", default="unknown", metavar="ID", help="license of the weights (default: unknown)")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")


def act(options: argparse.Namespace) -> int:
    """Write the card, and upload it if asked to."""
    from clframe.targets.card import hub_client, push_to_hub, require_repository, write_card

    if len(options.words) != 1:
        found = " ".join(options.words) or "nothing"
        raise ConfigError(f"card: found {found}; give one run folder, such as the one clframe run printed")
    repo = options.push_to_hub
    if options.public and repo is None:
        raise ConfigError("card: --public has an effect with --push-to-hub only; leave it out")
    client = None
    if repo is not None:
        require_repository(repo)
        client = hub_client()
    folder = write_card(options.words[0], output=options.output, license=options.license)
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    if repo is not None:
        print(push_to_hub(folder, repo, public=options.public, client=client))
    if options.license == "unknown":
        print("clframe: the card states no license; give one with --license", file=sys.stderr)
    return 0
