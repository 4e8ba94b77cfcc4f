"""Run folders as a report reads them, with configs flattened for comparison."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clframe.accounting import Ledger
from clframe.config.files import MOST_YAML, read_yaml
from clframe.config.typed import as_tree, from_mapping
from clframe.core import parse
from clframe.core.expression import split_terms
from clframe.errors import ClframeError, RunFolderError, reword
from clframe.exits.diagnostics import ExitRecord
from clframe.files import check_contained, read_json, read_text
from clframe.metrics.continual import Matrix, final_average_accuracy
from clframe.report.confusion import Counts, read_confusion
from clframe.report.latency import Timings, read_timings
from clframe.results import Result
from clframe.run_folder import SELECTION, SWEEP_RECORDS
from clframe.sparsity.activity import ActivityRecord

NO_MATTER = ("seed", "output", "trainer.progress", "trainer.loggers", "trainer.log_every", "trainer.figures",
             "trainer.checkpoint.every", "benchmark.workers")  # fmt: skip
"""Keys of a config that do not affect results, and the seed."""

ADDED = ("sparsity", "moe", "exits", "early_exit")
"""Components that are added to a method rather than being one, in the order in which they are named."""


def config_of(path: Path) -> dict[str, Any]:
    """Read a resolved config file as nested plain values, with defaults for options it lacks."""
    tree = read_yaml(path)
    try:
        return as_tree(from_mapping({str(key): value for key, value in tree.items()}))
    except ClframeError as error:
        raise reword(error, lambda message: f"{path}: {message}") from None


def settings_of(config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return the flat config and the canonical strategy, equal for two spellings of one strategy."""
    tree = {key: value for key, value in config.items() if key not in ("strategy", "components", "earlier")}
    if config.get("earlier"):  # two extensions by the same data are different runs if their parents are
        tree["extends"] = " > ".join(f"{Path(e['run']).name} ({e['sha256'][:8]})" for e in config["earlier"])
    strategy = str(config["strategy"])
    try:
        composition = parse(strategy, config["components"])
        strategy, components = str(composition), {component.name: asdict(component) for component in composition}
    except ClframeError:  # a component of a package that is not installed
        components = dict(config["components"])
    flat = {"strategy": strategy, **flatten(tree), **flatten(components)}
    return {key: value for key, value in flat.items() if key not in NO_MATTER}, strategy


def flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings into one with dotted keys, values as JSON.

    >>> flatten({"trainer": {"epochs": 2, "devices": [0]}})
    {'trainer.epochs': '2', 'trainer.devices': '[0]'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def as_written(strategy: str, command: object) -> str:
    """Return the names of a strategy in the order in which the command that started the run has them.

    A run records the order in which they were written; earlier versions recorded the alphabetical one. So where that is
    the order and the command does not name the same components, what is added to a method comes last.

    Args:
        strategy: The names, joined by ``+``.
        command: Words of the command, of which ``strategy=...`` is used.

    >>> as_written("exits + lwf", ["clframe", "run", "quickstart", "strategy=lwf(alpha=2) + exits"])
    'lwf + exits'
    >>> as_written("er + exits + lwf", None), as_written("lwf + exits + er", None)
    ('er + lwf + exits', 'lwf + exits + er')
    """
    names = strategy.split(" + ")
    if names != sorted(names):
        return strategy
    words = [word for word in command if isinstance(word, str)] if isinstance(command, list) else []
    given = next((word.removeprefix("strategy=") for word in reversed(words) if word.startswith("strategy=")), "")
    order = [name for name in (term.partition("(")[0].strip() for term in split_terms(given)) if name in names]
    if sorted(order) != sorted(names):
        order = sorted(names, key=lambda name: ADDED.index(name) if name in ADDED else -1)
    return " + ".join(order)


class Logged(NamedTuple):
    """One row of metrics.csv."""

    experience: int
    step: int
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Without ``result`` it is in progress or was killed."""

    path: Path
    config_text: str
    settings: Mapping[str, str]
    """Flat config with every option of the strategy's components, without keys that do not affect results."""
    name: str
    seed: int
    strategy: str
    """Names of the components in the order in which they were written, see :func:`as_written`."""
    benchmark: str
    backbone: str
    experiences: int
    """Number of experiences of the benchmark; 0 before the first evaluation."""
    result: Result | None
    accuracy_matrix: Matrix
    accuracy_matrix_task_aware: Matrix
    exits: Sequence[ExitRecord]
    exit_names: Sequence[str]
    logged: Sequence[Logged]
    stage_macs: Mapping[str, int]
    """MACs of one prediction by stage; empty where not in ledger.json."""
    phase_macs: Mapping[str, int]
    """MACs of the whole run by phase; empty where not in ledger.json."""
    uncounted: Mapping[str, int]
    """Operators without a MAC formula, and how often they ran."""
    environment: Mapping[str, Any]
    ledger: Ledger | None = None
    """Cost ledger; None where ledger.json has none."""
    timings: Timings | None = None
    """Latencies, where measured."""
    activity: Sequence[ActivityRecord] = ()
    """Activity of hidden neurons and experts after each experience."""
    confusion: Counts = ()
    """Test samples by true and predicted class at the end, in learning order; empty where not recorded."""

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.result is not None


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the run folders given, and those found below folders that are not run folders.

    Raises:
        RunFolderError: A folder does not exist or contains no run.
    """
    given: dict[Path, Path] = {}
    below: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            found = "is a file" if path.exists() else "no such folder"
            raise RunFolderError(f"{path}: {found}; give a run folder, or a parent of run folders")
        if (path / "config.yaml").is_file() or (path / "results.json").is_file():
            given[path.resolve()] = path
            continue
        here = sorted(p for p in path.rglob("*") if p.is_dir() and _is_run(p) and not _is_selection(p, path))
        if not here:
            raise RunFolderError(f"{path}: not a run, and no run below it; give a folder that clframe run printed")
        below.update((p.resolve(), p) for p in here)
    return list(given.values()), [p for key, p in below.items() if key not in given]


def _is_run(path: Path) -> bool:
    return (path / "results.json").is_file() or all(
        (path / name).is_file() for name in ("config.yaml", "environment.json")
    )


def _is_selection(path: Path, above: Path) -> bool:
    """Whether a run below ``above`` is one of a sweep's selection, whose accuracies are not those of test data."""
    parts = path.relative_to(above).parts[:-1]
    folders = (above.joinpath(*parts[: i + 1]) for i, part in enumerate(parts) if part == SELECTION)
    return any((folder.parent / SWEEP_RECORDS).is_dir() for folder in folders)


class Config(NamedTuple):
    """A resolved config as a report uses it."""

    tree: Mapping[str, Any]
    settings: Mapping[str, str]
    strategy: str


_SEED = re.compile(r"^seed: (\d{1,20})$", re.MULTILINE)


def _config(path: Path, text: str, known: dict[str, Config]) -> Config:
    """Return the config in a file; files that differ only in their seed are parsed once, which takes 40 ms."""
    seeds = _SEED.findall(text)
    key = _SEED.sub("seed:", text) if len(seeds) == 1 else text
    if key not in known:
        tree = config_of(path)
        known[key] = Config(tree, *settings_of(tree))
    found = known[key]
    return found._replace(tree={**found.tree, "seed": int(seeds[0])}) if len(seeds) == 1 else found


def load_run(path: Path, known: dict[str, Config] | None = None) -> Run:
    """Read everything that a report shows of one run folder.

    Args:
        path: The folder.
        known: Configs parsed before, which the one of this run is added to; None parses it in any case.

    Raises:
        ClframeError: A file that is damaged, of a newer schema, or does not fit the others.
    """
    if not (path / "config.yaml").is_file():
        raise RunFolderError(f"{path}: has results.json but no config.yaml; restore it or run again")
    check_contained(path)
    try:
        text = read_text(path / "config.yaml", most=MOST_YAML)
    except ValueError as error:
        raise RunFolderError(f"{path / 'config.yaml'}: invalid YAML ({error}); restore it or run again") from None
    config, settings, strategy = _config(path / "config.yaml", text, {} if known is None else known)
    result = _result(path, seed=config["seed"])
    if result is None:
        accuracy_TE, aware_TE, exits = _from_checkpoint(path)
        names: Sequence[str] = [f"exit {k}" for k in range(len(exits[-1].macs_K))] if exits else ()
    else:
        accuracy_TE, aware_TE = result.accuracy_matrix, result.accuracy_matrix_task_aware
        exits, names = result.exits, result.exit_names
    environment = _json(path / "environment.json")
    ledger = _json(path / "ledger.json")
    totals = ledger.get("totals")
    totals = totals if isinstance(totals, Mapping) else {}
    return Run(
        path=path, config_text=text, settings=settings,
        name=str(config["name"]), seed=config["seed"],
        strategy=as_written(result.strategy if result else strategy, environment.get("command")),
        benchmark=result.benchmark if result else str(config["benchmark"]["name"]),
        backbone=str(config["backbone"]["name"]), experiences=len(accuracy_TE[0]) if accuracy_TE else 0,
        result=result, accuracy_matrix=accuracy_TE, accuracy_matrix_task_aware=aware_TE, exits=exits,
        exit_names=names, logged=_logged(path / "metrics.csv"), stage_macs=_counts(ledger.get("inference_macs")),
        phase_macs=_counts(totals.get("by_phase")), uncounted=_counts(totals.get("uncounted")),
        environment=environment, ledger=_ledger(ledger, path / "ledger.json"),
        timings=read_timings(path), activity=result.activity if result else (),
        confusion=read_confusion(path, result) if result else (),
    )  # fmt: skip


def _result(path: Path, *, seed: int) -> Result | None:
    file = path / "results.json"
    if not file.is_file():
        return None
    result = Result.from_json(file)
    if result.seed != seed:
        raise RunFolderError(f"{file}: seed {result.seed}, but config.yaml has {seed}; restore the file that is wrong")
    _check_shapes(result, file)
    return result


def _check_shapes(result: Result, file: Path) -> None:
    """Refuse a file that was edited or damaged: all numbers of a report depend on these fields."""
    for field in ("accuracy_matrix", "accuracy_matrix_task_aware"):
        matrix: Matrix = getattr(result, field)
        if not matrix or any(len(row) != len(result.test_samples) for row in matrix) or not matrix[0]:
            raise RunFolderError(f"{file}: rows of {field} do not fit test_samples; restore the file or run again")
        if any(accuracy < 0 or accuracy > 1 for row in matrix for accuracy in row):
            raise RunFolderError(f"{file}: {field} has a number outside 0 to 1; restore the file or run again")
    expected = final_average_accuracy(result.accuracy_matrix).value
    found = result.score("final_average_accuracy").value
    if not (math.isnan(expected) and math.isnan(found)) and not math.isclose(expected, found, abs_tol=1e-9):
        raise RunFolderError(
            f"{file}: final_average_accuracy is {found:g}, but {expected:g} by accuracy_matrix; restore the file or "
            f"run again"
        )
    exits, names = result.exits, result.exit_names
    if (exits and len(exits) != len(result.accuracy_matrix)) or any(len(r.macs_K) != len(names) for r in exits):
        raise RunFolderError(f"{file}: exits do not fit exit_names and experiences; restore the file or run again")


def _from_checkpoint(path: Path) -> tuple[Matrix, Matrix, Sequence[ExitRecord]]:
    """Return accuracy matrices and exit records from the newest checkpoint of an unfinished run."""
    if not any((path / "checkpoints").glob("experience_*.ckpt")):
        return (), (), ()
    import torch

    from clframe.metrics.tally import Tally
    from clframe.training.checkpoint import load_latest

    content = load_latest(path / "checkpoints", device=torch.device("cpu")) or {}
    try:
        tallies = [Tally(**tally) for tally in content["tallies"]]
        exits = [ExitRecord.of(record) for record in content["exits"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: its newest checkpoint cannot be read ({error}); delete it") from None
    return [t.accuracy_E for t in tallies], [t.accuracy_aware_E for t in tallies], exits


def _logged(path: Path) -> list[Logged]:
    if not path.is_file():
        return []
    try:
        return [
            Logged(int(row["experience"]), int(row["step"]), str(row["name"]), float(row["value"]))
            for row in csv.DictReader(io.StringIO(read_text(path), newline=""))
        ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        raise RunFolderError(f"{path}: is damaged; restore it, or delete it to report without losses") from None


def _ledger(found: Mapping[str, Any], path: Path) -> Ledger | None:
    tree = found.get("ledger")
    if tree is None:
        return None
    try:
        return Ledger.of(tree if isinstance(tree, Mapping) else {})
    except RunFolderError as error:
        raise RunFolderError(f"{path}: {error}") from None


def _counts(found: object) -> dict[str, int]:
    """Return a mapping of names to integers, empty where the value is something else."""
    if not isinstance(found, Mapping) or any(type(macs) is not int for macs in found.values()):
        return {}
    return {str(name): count for name, count in found.items()}


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RunFolderError(f"{path}: is damaged; restore it, or delete it to report without it")
    return found
