"""State and numbers of runs from the files of their folders, read without torch.

Of a finished run this is results.json; of others config.yaml, log.txt and the names of the checkpoints.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clframe.files import read_json, read_text
from clframe.run_folder import DEVELOPMENT, RESULTS_SCHEMA, RunFolder, started_at

DEEPEST: Final = 5
"""Folders below the one with all runs in which runs are looked for."""
_MOST_CONFIG = 2**22
_FILES = ("results.json", "environment.json", "config.yaml")
_CHECKPOINT = re.compile(r"experience_(\d+)\.ckpt|inside_(\d+)_step_(\d+)\.ckpt")
_EXPERIENCE = re.compile(r"(?:(?:resumed|stopped) after )?experience (\d+)/(\d+)\b")
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run. Numbers that are unknown or undefined are NaN."""

    path: Path
    name: str = ""
    strategy: str = ""
    benchmark: str = ""
    backbone: str = ""
    devices: str = ""
    """Number of devices, or the indices of GPUs; empty where unknown."""
    seed: int | None = None
    accuracy: float = math.nan
    """Final average accuracy."""
    forgetting: float = math.nan
    macs: float = math.nan
    """Mean MACs of a prediction."""
    state: str = "damaged"
    """``running``, ``finished``, ``stopped``, ``failed``, ``diverged`` or ``damaged``."""
    detail: str = ""
    """Place of a run that trains or was stopped, or the reason of its state."""
    age: float = math.nan
    """Seconds since the last line of the log."""


def find_folders(output: Path) -> list[Path]:
    """Return the run folders below a folder; links and hidden folders are not followed."""
    return list(_find(output, depth=0))


def _find(folder: Path, *, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    if any(entry.name in _FILES for entry in entries) and depth:
        yield folder
        return
    if depth == DEEPEST:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            try:
                yield from _find(Path(entry.path), depth=depth + 1)
            except OSError:  # a folder without permission
                continue


def read_state(path: Path, *, now: float) -> RunState:
    """Read one run folder; one that cannot be read has the state ``damaged`` and the reason as its detail.

    Args:
        path: The folder.
        now: Seconds since the epoch.
    """
    lines = _session(path)
    age = max(0.0, now - _time_of(path, lines))
    try:
        if (path / "results.json").exists():
            return _finished(path, age=age)
        return _unfinished(path, lines, age=age)
    except _Damaged as damage:
        return RunState(path=path, detail=str(damage), age=age)


class _Damaged(Exception):
    """A file that cannot be read, with the reason."""


def _finished(path: Path, *, age: float) -> RunState:
    file = path / "results.json"
    try:
        found = read_json(file)
    except OSError as error:
        raise _Damaged(f"results.json: {error.strerror or error}") from None
    except ValueError:
        raise _Damaged("results.json: not JSON") from None
    try:
        version, metrics = found["schema_version"], found.get("metrics", found)  # version 1 has them as fields
        diverged = found.get("diverged", ())
        if type(version) is not int or not isinstance(diverged, (list, tuple)):
            raise TypeError
        if version > RESULTS_SCHEMA:
            raise _Damaged(f"results.json: schema_version {version}, this clframe reads 1 to {RESULTS_SCHEMA}")
        mean = RunFolder(path).mean_prediction_macs()
        return RunState(
            path=path, name=_text(found["name"]), strategy=_text(found["strategy"]),
            benchmark=_text(found["benchmark"]), backbone=_text(found.get("backbone", "")),
            devices=_devices_of_finished(path), seed=_seed(found["seed"]),
            accuracy=_number(metrics["final_average_accuracy"]),
            forgetting=_number(metrics["forgetting"]), macs=_number(found["macs"]) if mean is None else mean,
            state="diverged" if diverged else "finished",
            detail=str(diverged[0]) if diverged else DEVELOPMENT[1:-1] * _text(found["name"]).endswith(DEVELOPMENT),
            age=age,
        )  # fmt: skip
    except KeyError as error:
        raise _Damaged(f"results.json: no field {error}") from None
    except (TypeError, AttributeError):
        raise _Damaged("results.json: not the results of a run") from None


def _unfinished(path: Path, lines: Sequence[str], *, age: float) -> RunState:
    config = _config(path / "config.yaml")
    state, detail = _progress(path, lines)
    try:
        return RunState(
            path=path, name=_text(config["name"]), strategy=_text(config["strategy"]),
            benchmark=_name_in(config, "benchmark"),
            backbone=_name_in(config, "backbone") if "backbone" in config else "", devices=_devices(config),
            seed=_seed(config["seed"]), state=state, detail=detail, age=age,
        )  # fmt: skip
    except KeyError as error:
        raise _Damaged(f"config.yaml: no key {error}") from None
    except TypeError:
        raise _Damaged("config.yaml: not the config of a run") from None


def _config(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        # The loader written in C reads a config in a tenth of the time.
        found = yaml.load(read_text(file, most=_MOST_CONFIG), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise _Damaged("no config.yaml and no results.json") from None
    except OSError as error:
        raise _Damaged(f"config.yaml: {error.strerror or error}") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise _Damaged("config.yaml: not YAML") from None
    if not isinstance(found, dict):
        raise _Damaged("config.yaml: not a mapping")
    return found


def _name_in(config: Mapping[str, Any], block: str) -> str:
    """The name in a block, which may be written as the name alone."""
    found = config.get(block)
    return _text(found["name"] if isinstance(found, Mapping) else found)


def _devices_of_finished(path: Path) -> str:
    try:
        return _devices(_config(path / "config.yaml"))
    except _Damaged:  # the results are known all the same
        return ""


def _devices(config: Mapping[str, Any]) -> str:
    trainer = config.get("trainer")
    found = trainer.get("devices") if isinstance(trainer, Mapping) else None
    numbers = found if isinstance(found, list) else [found]
    return ", ".join(map(str, numbers)) if all(type(number) is int for number in numbers) else ""


def _progress(path: Path, lines: Sequence[str]) -> tuple[str, str]:
    """Return state and detail of a run without results."""
    experiences = [found for line in lines if (found := _EXPERIENCE.match(line))]
    done = f"after experience {experiences[-1][1]}/{experiences[-1][2]}" if experiences else ""
    if RunFolder(path).is_locked():
        return "running", done
    for line in lines:
        word, colon, reason = line.partition(": ")
        if colon and word in ("failed", "diverged"):
            return word, reason
    saved = [line.removeprefix("saved at ") for line in lines if line.startswith("saved at ")]
    return "stopped", f"at {saved[-1]}" if saved else _checkpoint(path) or done or "before its first checkpoint"


def _checkpoint(path: Path) -> str:
    """Return the place of the newest checkpoint: (finished experiences, steps of the next)."""
    places: list[tuple[int, int]] = []
    try:
        for name in os.listdir(path / "checkpoints"):
            found = _CHECKPOINT.fullmatch(name)
            if found:
                places.append((int(found[1]), 0) if found[1] else (int(found[2]) - 1, int(found[3])))
    except OSError:
        return ""
    if not places:
        return ""
    finished, step = max(places)
    return f"at experience {finished + 1}, step {step}" if step else f"after experience {finished}"


def _session(path: Path) -> list[str]:
    """The lines of log.txt since the run was last started or resumed, the time in front of the last one."""
    try:
        lines = [found for line in read_text(path / "log.txt").splitlines() if (found := _LINE.fullmatch(line))]
    except (OSError, ValueError):
        return []
    begins = [i for i, line in enumerate(lines) if line[2] == "started" or line[2].startswith("resumed after ")]
    texts = [line[2] for line in lines[begins[-1] if begins else 0 :]]
    return [*texts, lines[-1][1]] if lines else []


def _time_of(path: Path, lines: Sequence[str]) -> float:
    """Seconds since the epoch of the last line, or of what the folder's name or its times say."""
    for text, form in ((lines[-1] if lines else "", "%Y-%m-%d %H:%M:%S"), (started_at(path), "%Y%m%d-%H%M%S")):
        try:
            return time.mktime(time.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    try:
        return path.stat().st_mtime
    except OSError:
        return math.nan


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _seed(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)
