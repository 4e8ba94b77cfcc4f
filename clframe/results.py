"""The results of a run: one frozen object, one JSON file with a documented and versioned schema.

Every field is described in ``docs/results_schema.md``. Inside a run classes are numbered in learning order; everything
here uses the data set's own class ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clframe.errors import ClframeError, RunFolderError, nearest
from clframe.exits.diagnostics import ExitRecord, forgetting_by_exit
from clframe.files import read_json, write_atomically
from clframe.functional.language import perplexity
from clframe.metrics.confusion import MOST_SHOWN
from clframe.metrics.continual import NAN, Score
from clframe.metrics.registry import scores
from clframe.metrics.statistics import deviation, mean
from clframe.metrics.tally import Tally
from clframe.records import read_record, to_json
from clframe.run_folder import RESULTS_SCHEMA as SCHEMA_VERSION
from clframe.sparsity.activity import ActivityRecord

_METRICS_OF_VERSION_1: Final = (
    "final_average_accuracy", "final_average_accuracy_task_aware", "final_weighted_accuracy",
    "average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer", "learning_accuracy",
)  # fmt: skip
"""Fields of a version-1 file that are entries of ``metrics`` since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Results of one run, as ``clframe.run`` returns them and ``results.json`` stores them.

    Every metric is also an attribute: ``result.forgetting`` is ``result.metrics["forgetting"]``.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    strategy: str
    benchmark: str
    backbone: str
    seed: int
    metrics: Mapping[str, float]
    """By name in :data:`~clframe.metrics.METRICS`; NaN where undefined."""
    undefined: Mapping[str, str]
    """Why a metric is NaN."""
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
    diverged: tuple[str, ...] = field(default=())
    skipped_updates: tuple[int, ...] = field(default=())
    """Updates skipped in each experience, since losses or gradients were not finite; empty unless
    ``trainer.on_nonfinite`` is ``skip``."""
    exit_names: tuple[str, ...] = field(default=())
    exit_forgetting: tuple[float, ...] = field(default=())
    exits: tuple[ExitRecord, ...] = field(default=())
    activity: tuple[ActivityRecord, ...] = field(default=())
    confusion: tuple[tuple[int, ...], ...] = field(default=())
    """Test samples by true class (rows) and predicted class (columns), both in ``class_order``, at the end; empty
    beyond :data:`~clframe.metrics.confusion.MOST_SHOWN` classes, where the file would take megabytes."""
    class_names: tuple[str, ...] = field(default=())
    """Name of each class, by the data set's own id; empty where it has none."""
    nll_matrix: tuple[tuple[float, ...], ...] = field(default=())
    """Nats per token of a language model: rows after experience i, columns on test experience j; empty for others."""
    exit_forgetting_nats: tuple[float, ...] = field(default=())
    """Forgetting of each exit of a language model, in nats per token."""
    batches: int | None = None
    """Batches trained on; more than ``steps`` with ``trainer.accumulate`` and where updates were skipped."""

    @property
    def perplexity_matrix(self) -> tuple[tuple[float, ...], ...]:
        """The exponentials of :attr:`nll_matrix`."""
        return tuple(tuple(map(perplexity, row)) for row in self.nll_matrix)

    def __getattr__(self, name: str) -> float:
        """Return the metric called ``name``."""
        # Copying and unpickling ask for dunder names, and for ``metrics``, before any field is set.
        metrics = {} if name == "metrics" or name.startswith("__") else self.metrics
        if name in metrics:
            return metrics[name]
        close = nearest(name, metrics)
        advice = f"; did you mean '{close}'?" if close else ""
        raise AttributeError(f"Result has no field or metric '{name}'{advice}")

    def class_label(self, class_id: int) -> str:
        """Return the name of a class, or its id where it has none."""
        return self.class_names[class_id] if class_id < len(self.class_names) else str(class_id)

    def score(self, name: str) -> Score:
        """Return a metric with the reason where it is undefined, also of one that this run has not computed."""
        if name not in self.metrics:
            return Score(NAN, "not in results.json, which an earlier version wrote or another set of packages")
        return Score(self.metrics[name], self.undefined.get(name, ""))

    def to_json(self) -> str:
        """Return JSON text, one field a line; NaN is written as ``null``."""
        return to_json(self)

    @classmethod
    def upgrade(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the content of a version-1 file in the shape of version 2."""
        if content.get("schema_version") != 1:
            return content
        metrics = {name: content[name] for name in _METRICS_OF_VERSION_1 if name in content}
        return {**content, "schema_version": SCHEMA_VERSION, "metrics": metrics}

    @classmethod
    def from_json(cls, path: str | Path) -> Result:
        """Read ``results.json`` of this or an earlier version; raises :class:`RunFolderError` for any other file."""
        try:
            found = read_json(path)
        except OSError as error:
            raise RunFolderError(f"{path}: {error.strerror or error}; give a readable results.json") from None
        except ValueError:  # neither UTF-8 nor JSON, or of absurd size or depth
            raise RunFolderError(f"{path}: not JSON; give the results.json of a finished run") from None
        version = found.get("schema_version") if isinstance(found, dict) else None
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise RunFolderError(
                f"{path}: schema_version {version!r}, this clframe reads 1 to {SCHEMA_VERSION}; "
                f"read it with the version of clframe that wrote it"
            )
        return read_record(cls, found, prefix=f"{path}: ")

    def write(self, path: str | Path) -> None:
        """Write :meth:`to_json` to the file ``path``, all or nothing."""
        write_atomically(path, self.to_json())


def refuse_newer_results(path: str | Path) -> None:
    """Refuse to overwrite a ``results.json`` that a later version wrote; a missing or damaged one may be written again.

    Raises:
        RunFolderError: The file has a newer schema.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return
    version = found.get("schema_version") if isinstance(found, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise RunFolderError(
            f"{path}: schema_version {version}, this clframe writes {SCHEMA_VERSION} and would overwrite it; resume "
            f"the run with the version of clframe that wrote it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """Mean and sample standard deviation of every metric over the seeds of one experiment."""

    schema_version: int = SCHEMA_VERSION
    strategy: str
    benchmark: str
    backbone: str
    seeds: tuple[int, ...]
    mean: Mapping[str, float]
    """By metric; NaN where any seed has no number."""
    deviation: Mapping[str, float]
    """``sqrt(sum (x - mean)^2 / (n - 1))``; NaN for one seed."""

    def to_json(self) -> str:
        """Return JSON text, one field a line; NaN is written as ``null``."""
        return to_json(self)


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
    diverged: Sequence[str] = (),
    skipped_updates: Sequence[int] = (),
    exit_names: Sequence[str] = (),
    exits: Sequence[ExitRecord] = (),
    activity: Sequence[ActivityRecord] = (),
    confusion: Sequence[Sequence[int]] = (),
    class_names: Sequence[str] = (),
    batches: int | None = None,
) -> Result:
    """Compute the results of a run from the evaluations after each training experience.

    Args:
        tallies: One evaluation per training experience.
        name: Of the experiment.
        strategy: Its expression.
        benchmark: Name of the benchmark.
        backbone: Name of the backbone.
        seed: Of the run.
        class_order: The data set's id of the class learned first, second and so on.
        experiences: Classes of each experience in learning order, numbered from 0; the result has the data set's ids.
        parameters: Of the model at the end.
        macs: Of one forward pass of one sample; None where not counted.
        train_seconds: Wall time of training.
        steps: Optimizer steps.
        state_bytes: Size of each component's state.
        versions: By package.
        run_folder: Where the run's files are.
        baseline: An evaluation before any training, for forward transfer.
        loss_terms: Means of every loss term in each training experience.
        diverged: One line for each experience whose losses or weights were not finite.
        skipped_updates: In each experience; empty where none are skipped.
        exit_names: In order of depth.
        exits: One record per training experience.
        activity: One record per training experience.
        confusion: Test samples by true and predicted class after the last experience, in learning order; left out
            beyond :data:`~clframe.metrics.confusion.MOST_SHOWN` classes.
        class_names: Name of each class, by its id in the data set; empty if unknown.
        batches: Batches trained on.

    Raises:
        ClframeError: No tallies, tallies of different shapes, or a class order that does not fit them.
    """
    found = scores(tallies, baseline=baseline)
    last = tallies[-1]
    ids = tuple(int(c) for c in class_order)  # plain numbers even of an array, so that json can write them
    classes = len(last.accuracy_C)
    if len(ids) != classes or len(set(ids)) < classes:
        raise ClframeError(f"class_order: {list(ids)} for {classes} classes; name each class once")
    return Result(
        name=name, strategy=strategy, benchmark=benchmark, backbone=backbone, seed=seed,
        metrics={metric: score.value for metric, score in found.items()},
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
        diverged=tuple(diverged),
        skipped_updates=tuple(skipped_updates),
        exit_names=tuple(exit_names), exits=tuple(exits), exit_forgetting=_exit_forgetting(exits),
        activity=tuple(activity),
        confusion=tuple(tuple(row) for row in confusion) if len(confusion) <= MOST_SHOWN else (),
        class_names=tuple(class_names),
        nll_matrix=tuple(tally.nll_E for tally in tallies) if last.nats_E else (),
        exit_forgetting_nats=_exit_forgetting_nats(exits),
        batches=batches,
    )  # fmt: skip


def _exit_forgetting(exits: Sequence[ExitRecord]) -> tuple[float, ...]:
    """Compute forgetting of each exit's own accuracy matrix."""
    matrices = zip(*(record.accuracy_KE for record in exits), strict=True)
    return tuple(score.value for score in forgetting_by_exit([tuple(matrix) for matrix in matrices]))


def _exit_forgetting_nats(exits: Sequence[ExitRecord]) -> tuple[float, ...]:
    """Compute forgetting of each exit's own matrix of log-likelihoods; empty for classifiers."""
    matrices = zip(*(record.nll_KE for record in exits), strict=True)
    likelihood_KTE = [[[-nats for nats in row] for row in matrix] for matrix in matrices]
    return tuple(score.value for score in forgetting_by_exit(likelihood_KTE))


def aggregate(results: Sequence[Result]) -> Aggregate:
    """Compute mean and sample standard deviation of each metric over seeds.

    Raises:
        ClframeError: No results, results of different experiments, or a seed given twice, which would make the
            deviation too small.
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
    names = dict.fromkeys(metric for result in results for metric in result.metrics)
    values = {metric: [result.score(metric).value for result in results] for metric in names}
    return Aggregate(
        strategy=first.strategy, benchmark=first.benchmark, backbone=first.backbone, seeds=seeds,
        mean={metric: mean(xs) for metric, xs in values.items()},
        deviation={metric: deviation(xs) for metric, xs in values.items()},
    )  # fmt: skip
