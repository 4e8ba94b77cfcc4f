"""Train a config with two git revisions and compare losses, accuracies and weights.

    python tests/golden/compare.py HEAD~3 HEAD                          # the quickstart, two batches per experience
    python tests/golden/compare.py v0.1.0 . my.yaml trainer.epochs=2    # a config and overrides; "." is the working tree

Prints the first value that differs of each kind and the largest relative difference; exit code 1 if there is any. Every
revision is unpacked into a temporary folder; a config given as a file must be readable by both revisions. Runs are
on the CPU with one thread, where equal code gives equal bits.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
KEPT = ("accuracy_matrix", "accuracy_by_class", "metrics", "loss_terms", "steps", "forward_transfer")
"""Keys of results.json that depend on the numbers of a run only, not on time and place."""
COMPARED = ("loss/", "gradient/norm")
"""Series of metrics.csv with the same property."""
RUN = "import sys; from clframe.cli import main; sys.exit(main(sys.argv[1:]))"


def unpack(revision: str, folder: Path) -> Path:
    """Unpack a revision into ``folder``; the working tree is used where it is.

    Raises:
        SystemExit: git does not know the revision.
    """
    if revision == ".":
        return ROOT
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    command = ["git", "archive", "--output", str(archive), revision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0]
        sys.exit(f"compare: cannot unpack '{revision}' ({reason}); give a revision that git knows, or . for the working tree")
    with tarfile.open(archive) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        packed.extractall(folder)
    return folder


def train(source: Path, output: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Train with the code in ``source`` and return the numbers of the run by name.

    Raises:
        SystemExit: The run failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUN, "run", *arguments, "--output", str(output), "--device", "cpu", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"compare: {source.name}: the run ended with code {done.returncode}\n{done.stderr.strip()}")
    (folder,) = (path.parent for path in output.rglob("results.json"))
    return numbers(folder)


def numbers(folder: Path) -> dict[str, Any]:
    """Collect what a run folder has that two equal runs share: losses, results and the last weights."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = {f"results.json {key}": results[key] for key in KEPT if key in results}
    losses = folder / "metrics.csv"
    if losses.exists():
        with losses.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if row["name"].startswith(COMPARED):
                    found.setdefault(f"metrics.csv {row['name']}", []).append(row["value"])
    last = max(folder.glob("checkpoints/experience_*.ckpt"), default=None)
    if last is not None:
        weights = torch.load(last, weights_only=True, map_location="cpu")["network"]
        found |= {f"weights {name}": value.tolist() for name, value in weights.items() if torch.is_tensor(value)}
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Iterate over lines that describe the first difference of each name, and its largest relative difference.

    >>> list(differences({"loss": [1.0, 2.0]}, {"loss": [1.0, 2.5]}))
    [('loss[1]: 2.0 before, 2.5 after', 0.2)]
    """
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name}: only {'after' if name in after else 'before'}", math.inf
            continue
        found = list(_differing(before[name], after[name], name))
        if found:
            yield found[0][0], max(size for _, size in found)


def _differing(before: Any, after: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(before, dict) and isinstance(after, dict):
        before, after = ([f"{key}={value}" for key, value in sorted(side.items())] for side in (before, after))
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from _differing(*pair, f"{name}[{i}]")
    elif before != after and not before != before != after:
        yield f"{name}: {before} before, {after} after", _relative(before, after)


def _relative(before: Any, after: Any) -> float:
    try:
        one, other = float(before), float(after)
    except (TypeError, ValueError):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two revisions; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REV", help="a git revision, or . for the working tree")
    parser.add_argument("config", nargs="*", metavar="CONFIG [KEY=VALUE ...]", help="default: smoke/quickstart")
    options = parser.parse_args(arguments)
    config = list(options.config)
    if not config or "=" in config[0]:
        config = ["smoke/quickstart", *config]
    if not any(word.startswith("trainer.log_every=") for word in config):
        config.append("trainer.log_every=1")  # otherwise a short run logs no loss
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for i, revision in enumerate(options.revisions):
            source = unpack(revision, Path(folder) / f"source{i}")
            sides.append(train(source, Path(folder) / f"runs{i}", config))
    found = list(differences(*sides))
    for line, size in found:
        print(f"{line} (at most {size:.1e})")
    count = sum(name.startswith("weights") for name in sides[0])
    print(f"{len(found)} of {len(sides[0])} series differ ({count} of them weights)" if found else
          f"no difference in {len(sides[0])} series ({count} of them weights)")  # fmt: skip
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
