"""``clframe check``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.cli.context import parse_config

if TYPE_CHECKING:
    from clframe.targets.doctor import Finding

NAME = "check"
HELP = "check the installation, one line each: ok or what to do"
WORDS = "[CONFIG [KEY=VALUE ...]]"
DESCRIPTION = """\
Checks Python, the packages and their versions, GPU and driver, threads, folders and free space, and trains a tiny
network for a few seconds in a temporary folder. Prints one line per check: `ok`, or `fix` and what to do. With a config
the folders of its data and output are checked as well. The exit code is 0 if all is ok and 1 otherwise.

  clframe check
  clframe check --json
  clframe check my.yaml benchmark.data_dir=/data
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--no-run", action="store_true", help="leave out the run of a few seconds")
    parser.add_argument("--output", metavar="DIR", help="folder of run folders (default: that of the config, or runs)")
    parser.set_defaults(device=None, seed=None)


def act(options: argparse.Namespace) -> int:
    """Print the findings."""
    findings = []
    for finding in _findings(options):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return 0 if all(finding.ok for finding in findings) else 1


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    from clframe.targets import doctor

    yield doctor.check_python()
    packages = doctor.check_packages()
    yield from packages
    yield doctor.check_extras()
    if not doctor.is_safe(packages):
        return  # importing a package that is missing or malicious is what must not happen
    yield doctor.check_gpu()
    yield doctor.check_threads()
    output = options.output or "runs"
    if options.words:
        from clframe.config.load import load_config

        config = load_config(*parse_config(options))
        output = options.output or config.output
        yield from doctor.check_data(_data_options(config.benchmark.name, config.benchmark.options),
                                     name=config.benchmark.name)  # fmt: skip
    else:
        yield doctor.check_folder("data folder", Path("data"))
    yield doctor.check_folder("output", Path(os.path.expanduser(output)))
    if not options.no_run:
        from clframe.api import run

        yield doctor.check_trial(run)


def _data_options(name: str, given: dict[str, object]) -> dict[str, object]:
    """Options of a benchmark with their defaults."""
    from clframe.data import SOURCES
    from clframe.options import REQUIRED, check_options, option_types

    source = SOURCES.get(name, where="benchmark.name")
    defaults = {key: default for key, (_, default) in option_types(source).items() if default is not REQUIRED}
    return {**defaults, **check_options(source, given, where="benchmark")}
