"""A run's folder: what is in it, how it is made, how it is found again.

::

    runs/<experiment>/<id>/
      config.yaml  environment.json     resolved config; versions, git revision, machine
      checkpoints/                      the last two experiences
      metrics.csv  results.json  ledger.json
      tensorboard/  figures/
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clframe.accounting import Ledger, cumulative_macs, stage_macs
from clframe.environment import environment, versions
from clframe.errors import RunFolderError
from clframe.files import write_atomically
from clframe.nn.network import Network


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @classmethod
    def create(cls, output: Path, *, name: str, seed: int) -> RunFolder:
        """A new folder ``output/name/<time>-seed<n>``.

        Raises:
            RunFolderError: ``output`` cannot be written; nothing is left there then.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        endings = itertools.chain([""], (f"-{attempt}" for attempt in itertools.count(1)))
        while True:
            folder = cls(output / name / f"{stamp}-seed{seed}{next(endings)}")
            path = folder.path
            folder._made = [part for part in (path, *path.parents) if not os.path.exists(part)]
            try:
                path.mkdir(parents=True, exist_ok=False)
                (path / "checkpoints").mkdir()
                write_atomically(path / "environment.json", json.dumps(environment(), indent=2) + "\n")
                return folder
            except FileExistsError:
                continue
            except OSError as error:
                folder.discard()
                raise RunFolderError(
                    f"output: {path.parent} cannot be written ({error.strerror}); choose another --output"
                ) from None
            except BaseException:
                folder.discard()
                raise

    @classmethod
    def open(cls, path: Path, *, where: str = "resume") -> RunFolder:
        """The folder of an earlier run.

        Raises:
            RunFolderError: There is none, or it holds no config.
        """
        if not path.is_dir():
            raise RunFolderError(f"{where}: no folder {path}; give the run folder that a run printed")
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{where}: {path} holds no config.yaml; give the folder of a run, not one above it")
        return cls(path)

    def discard(self) -> None:
        """Remove this folder, of a run that could not begin, and the ones above it that were made for it."""
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # another run may be in it by now
                folder.rmdir()

    def write_config(self, text: str) -> None:
        """The resolved config."""
        write_atomically(self.config_path, text)

    def write_ledger(
        self,
        network: Network,
        steps: int,
        train_seconds: float,
        state_bytes: Mapping[str, int],
        *,
        ledger: Ledger | None = None,
    ) -> None:
        """What training took, what a prediction costs stage by stage, what components keep, and every entry."""
        names, cost_K = network.exit_names, cumulative_macs(network)
        costs: dict[str, Any] = {
            "convention": "macs: one multiply-add counts 1; FLOPs = 2 x MACs",
            "training": {"steps": steps, "seconds": train_seconds},
            "inference_macs": stage_macs(network),
            "exit_macs": dict(zip(names, cost_K, strict=True)),
            "state_bytes": dict(state_bytes),
        }
        if ledger is not None:
            costs["ledger"] = ledger.as_tree()
            costs["totals"] = {
                "macs": ledger.macs,
                "training_macs": ledger.training_macs,
                "by_phase": ledger.by_phase(),
                "by_component": ledger.by_component(),
                "samples": ledger.samples("forward"),
                "replayed_samples": ledger.samples("replay"),
                "seconds": ledger.seconds(),
                "bytes": ledger.bytes(),
                "energy": asdict(ledger.energy()),
                "uncounted": ledger.uncounted(),
                "prediction": _prediction(ledger),
            }
        write_atomically(self.path / "ledger.json", json.dumps(costs, indent=2) + "\n")

    @staticmethod
    def versions() -> dict[str, str]:
        """Versions of Python and of the packages that decide a run's numbers."""
        return versions()


def _prediction(ledger: Ledger) -> dict[str, Any]:
    """What a prediction costs at the end of the run; a mean without samples is null."""
    found = ledger.predictions
    mean = found.mean()
    return {
        "whole": found.whole(),
        "mean": None if math.isnan(mean) else mean,
        "by_component": found.by_component(),
        "by_exit": found.by_exit(),
        "samples_by_exit": found.samples_by_exit(),
        "dense_by_role": found.by_role(),
        "effective_by_role": found.by_role(count="effective"),
    }
