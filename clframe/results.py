"""The results of a run: one frozen object, one JSON file of a documented and versioned schema.

Every field is described in ``docs/results_schema.md``. Inside a run classes are numbered in learning
order; everything here uses the data set's own class ids.
"""

from __future__ import annotations

import json
import math
import statistics
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from clframe.errors import ClframeError, RunFolderError
from clframe.exits.diagnostics import ExitRecord, forgetting_by_exit
from clframe.files import write_atomically
from clframe.metrics.registry import METRICS, scores
from clframe.metrics.tally import Tally
from clframe.sparsity.activity import ActivityRecord

SCHEMA_VERSION = 1
"""Raised when a field is removed or changes its meaning; a new optional field does not raise it."""

@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What ``clframe.run`` returns and ``results.json`` holds; see ``docs/results_schema.md``."""

    schema_version: int = SCHEMA_VERSION
    name: str
    strategy: str
    benchmark: str
    backbone: str
    seed: int
    final_average_accuracy: float
    final_average_accuracy_task_aware: float
    final_weighted_accuracy: float
    average_incremental_accuracy: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float
    learning_accuracy: float
    undefined: Mapping[str, str]
    accuracy_matrix: tuple[tuple[float, ...], ...]
    accuracy_matrix_task_aware: tuple[tuple[float, ...], ...]
    accuracy_by_class: Mapping[int, float]
    class_order: tuple[int, ...]
    experiences: tuple[tuple[int, ...], ...]
    test_samples: tuple[int, ...]
    parameters: int
    macs: int | None
    train_seconds: float
    steps: int
    state_bytes: Mapping[str, int]
    versions: Mapping[str, str]
    run_folder: str
    loss_terms: tuple[Mapping[str, float], ...] = field(default=())
    exit_names: tuple[str, ...] = field(default=())
    exit_forgetting: tuple[float, ...] = field(default=())
    exits: tuple[ExitRecord, ...] = field(default=())
    activity: tuple[ActivityRecord, ...] = field(default=())

    def to_json(self) -> str:
        """The object as JSON text, one field a line; NaN is written as ``null``."""
        return _to_json(self)

    @classmethod
    def from_json(cls, path: str | Path) -> Result:
        """Read ``results.json``; raises :class:`RunFolderError` where the file is not such a file."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RunFolderError(f"{path}: {error.strerror or error}; give a readable results.json") from None
        except ValueError:  # neither UTF-8 nor JSON
            raise RunFolderError(f"{path}: not JSON; give the results.json of a finished run") from None
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise RunFolderError(
                f"{path}: schema_version {version!r}, this clframe reads {SCHEMA_VERSION}; "
                f"read it with the version of clframe that wrote it"
            )
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for entry in fields(cls):
            if entry.name in found:
                values[entry.name] = _decode(hints[entry.name], found[entry.name], f"{path}: {entry.name}")
            elif entry.default is MISSING:
                raise RunFolderError(f"{path}: field '{entry.name}' is missing; run the experiment again")
        return cls(**values)

    def write(self, path: str | Path) -> None:
        """Write :meth:`to_json` to the file ``path``, all or nothing."""
        write_atomically(path, self.to_json())


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """Mean and sample standard deviation of every metric over the seeds of one experiment."""

    schema_version: int = SCHEMA_VERSION
    strategy: str
    benchmark: str
    backbone: str
    seeds: tuple[int, ...]
    mean: Mapping[str, float]
    """By name in :data:`METRICS`; NaN where any seed has none."""
    deviation: Mapping[str, float]
    """``sqrt(sum (x - mean)^2 / (n - 1))``; NaN for one seed."""

    def to_json(self) -> str:
        """The object as JSON text, one field a line; NaN is written as ``null``."""
        return _to_json(self)


def summarize(
    tallies: Sequence[Tally],
    *,
    name: str,
    strategy: str,
    benchmark: str,
    backbone: str,
    seed: int,
    class_order: Sequence[int],
    experiences: Sequence[Sequence[int]],
    parameters: int,
    macs: int | None,
    train_seconds: float,
    steps: int,
    state_bytes: Mapping[str, int],
    versions: Mapping[str, str],
    run_folder: str | Path,
    baseline: Tally | None = None,
    loss_terms: Sequence[Mapping[str, float]] = (),
    exit_names: Sequence[str] = (),
    exits: Sequence[ExitRecord] = (),
    activity: Sequence[ActivityRecord] = (),
) -> Result:
    """The results of a run: every metric from the counts taken after each training experience.

    ``tallies`` holds one evaluation per training experience, ``baseline`` one of the model before any
    training, for forward transfer. ``class_order`` is the data set's id of the class learnt first, second
    and so on; ``experiences`` are each experience's classes in learning order, which the result holds in
    original ids. ``loss_terms`` are the means of every loss term in each training experience.

    Raises :class:`ClframeError` for no tallies, tallies of different shapes, or a class order that does
    not fit them.
    """
    found = scores(tallies, baseline=baseline)
    last = tallies[-1]
    ids = tuple(int(c) for c in class_order)  # plain numbers also where an array was given
    classes = len(last.accuracy_C)
    if len(ids) != classes or len(set(ids)) < classes:
        raise ClframeError(f"class_order: {list(ids)} for {classes} classes; name each class once")
    value = {metric: score.value for metric, score in found.items()}
    return Result(
        name=name, strategy=strategy, benchmark=benchmark, backbone=backbone, seed=seed,
        final_average_accuracy=value["final_average_accuracy"],
        final_average_accuracy_task_aware=value["final_average_accuracy_task_aware"],
        final_weighted_accuracy=value["final_weighted_accuracy"],
        average_incremental_accuracy=value["average_incremental_accuracy"],
        forgetting=value["forgetting"],
        backward_transfer=value["backward_transfer"],
        forward_transfer=value["forward_transfer"],
        learning_accuracy=value["learning_accuracy"],
        undefined={metric: score.undefined for metric, score in found.items() if score.undefined},
        accuracy_matrix=tuple(tally.accuracy_E for tally in tallies),
        accuracy_matrix_task_aware=tuple(tally.accuracy_aware_E for tally in tallies),
        accuracy_by_class=dict(zip(ids, last.accuracy_C, strict=True)),
        class_order=ids,
        experiences=tuple(tuple(ids[c] for c in brought) for brought in experiences),
        test_samples=last.samples_E,
        parameters=parameters, macs=macs, train_seconds=train_seconds, steps=steps,
        state_bytes=dict(state_bytes), versions=dict(versions), run_folder=str(run_folder),
        loss_terms=tuple(dict(terms) for terms in loss_terms),
        exit_names=tuple(exit_names), exits=tuple(exits), exit_forgetting=_exit_forgetting(exits),
        activity=tuple(activity),
    )  # fmt: skip


def _exit_forgetting(exits: Sequence[ExitRecord]) -> tuple[float, ...]:
    """Forgetting of each exit's own accuracy matrix."""
    matrices = zip(*(record.accuracy_KE for record in exits), strict=True)
    return tuple(score.value for score in forgetting_by_exit([tuple(matrix) for matrix in matrices]))


def aggregate(results: Sequence[Result]) -> Aggregate:
    """Mean and sample standard deviation of each metric over seeds.

    Raises :class:`ClframeError` for no results, for results of different experiments and for a seed
    that is there twice, which would make the deviation too small.
    """
    if not results:
        raise ClframeError("aggregate: no results; give at least one")
    first = results[0]
    for what in ("strategy", "benchmark", "backbone"):
        found = sorted({getattr(result, what) for result in results})
        if len(found) > 1:
            raise ClframeError(f"aggregate: results of more than one {what}, {', '.join(found)}; give one")
    seeds = tuple(result.seed for result in results)
    if len(set(seeds)) < len(seeds):
        raise ClframeError(f"aggregate: a seed is there twice in {list(seeds)}; give each seed once")
    values = {metric: [float(getattr(result, metric)) for result in results] for metric in METRICS}
    return Aggregate(
        strategy=first.strategy, benchmark=first.benchmark, backbone=first.backbone, seeds=seeds,
        mean={metric: math.fsum(xs) / len(xs) for metric, xs in values.items()},
        deviation={metric: _deviation(xs) for metric, xs in values.items()},
    )  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return float("nan")
    return statistics.stdev(values)


def _to_json(record: Result | Aggregate) -> str:
    lines = (f"  {json.dumps(e.name)}: {json.dumps(_plain(getattr(record, e.name)))}" for e in fields(record))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    """Numbers, text, lists and mappings as strict JSON knows them, which has neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if is_dataclass(value):
        return {e.name: _plain(getattr(value, e.name)) for e in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as the annotation ``hint`` of a field says; raises :class:`RunFolderError`."""
    outer, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        if set(value) != set(hints):
            raise RunFolderError(f"{where}: fields {sorted(set(value) ^ set(hints))} are missing or unknown; run again")
        return hint(**{name: _decode(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
    if outer is types.UnionType:  # X | None
        return None if value is None else _decode(inner[0], value, where)
    if outer is tuple and isinstance(value, list):
        return tuple(_decode(inner[0], entry, where) for entry in value)
    if outer is Mapping and isinstance(value, dict):
        return {_key(inner[0], key, where): _decode(inner[1], entry, where) for key, entry in value.items()}
    if hint is float and (value is None or value in ("Infinity", "-Infinity")):
        return float("nan") if value is None else float(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str) and type(value) is hint:
        return value
    raise RunFolderError(f"{where}: found {json.dumps(value)[:40]}; restore the file or run again")


def _key(hint: Any, key: str, where: str) -> Any:
    if hint is str:
        return key
    try:
        return int(key)
    except ValueError:
        raise RunFolderError(f"{where}: found the key {key!r}, not a number; restore the file") from None
