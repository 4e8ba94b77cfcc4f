"""Scalar metrics of a run: one entry here adds a metric to results, tables, reports and TensorBoard.

An entry has the function that computes the metric from the evaluations of a run, and its labels.
Another package adds one through the entry point group ``clframe.metrics``, a script with ``METRICS.add``::

    METRICS.add("worst_experience", Metric(
        label="accuracy on the worst experience",
        score=lambda found: min(found.accuracy_TE[-1]),
    ))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint
from typing import Final, Literal

from clframe.errors import ClframeError
from clframe.functional.language import perplexity
from clframe.metrics import continual
from clframe.metrics.continual import NAN, Matrix, Score
from clframe.metrics.tally import Tally
from clframe.registry import Registry

Kind = Literal["percent", "points", "whole", "decimal", "fine"]
"""Format of a number: ``percent`` and ``points`` times 100, points with their sign; ``whole`` without decimals,
``decimal`` with one, ``fine`` with three."""


@dataclass(frozen=True)  # no slots: the matrices are computed once for all metrics
class Evaluations:
    """The evaluations of a run that metrics are computed from."""

    tallies: Sequence[Tally]
    """One per training experience, in order."""
    baseline: Tally | None = None
    """Of the model before any training; None where it was not evaluated."""

    @cached_property
    def accuracy_TE(self) -> Matrix:
        """Task-agnostic accuracy matrix: after experience t, on test experience e."""
        return [tally.accuracy_E for tally in self.tallies]

    @cached_property
    def accuracy_aware_TE(self) -> Matrix:
        """Task-aware accuracy matrix."""
        return [tally.accuracy_aware_E for tally in self.tallies]

    @cached_property
    def log_likelihood_TE(self) -> Matrix:
        """Mean log-likelihood of a token, in nats: after experience t, on test experience e; of a language model."""
        return [[-nats for nats in tally.nll_E] for tally in self.tallies]

    @property
    def baseline_log_likelihood_E(self) -> Sequence[float] | None:
        """Mean log-likelihood of a token under the untrained model on each test experience."""
        return None if self.baseline is None else [-nats for nats in self.baseline.nll_E]

    @property
    def baseline_E(self) -> Sequence[float] | None:
        """Accuracy of the untrained model on each test experience."""
        return None if self.baseline is None else self.baseline.accuracy_E


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Definition and labels of one scalar metric of a run."""

    label: str
    """Name in tables and reports, without a unit."""
    score: Callable[[Evaluations], Score | float]
    """Value at the end of the run; a NaN should be a :class:`Score` with its reason."""
    running: Callable[[Evaluations], Score | float] | None = None
    """Value after each experience, for TensorBoard; None computes ``score`` of the evaluations so far."""
    tag: str = ""
    """TensorBoard tag; empty for ``continual/<name>``."""
    kind: Kind = "percent"
    better: Literal["higher", "lower", ""] = "higher"
    column: str = ""
    """Short heading in the terminal's table over seeds; empty leaves the metric out of that table."""
    compared: bool = False
    """If true, reports compare groups of runs by this metric."""
    per_token: bool = False
    """If true, it is computed for language models only."""


def _load_metric(point: EntryPoint) -> Iterator[tuple[str, Metric]]:
    entry = point.load()
    if not isinstance(entry, Metric):
        raise TypeError(f"{entry!r} is not a Metric")
    yield point.name, entry


METRICS: Registry[Metric] = Registry("metric", group="clframe.metrics", load=_load_metric)
"""Every scalar metric by name."""


def _weighted_so_far(found: Evaluations) -> Score:
    """Accuracy over the test samples of the experiences seen; the others would count as wrong."""
    seen = len(found.tallies)
    rows = [row[:seen] for row in found.accuracy_TE]
    return continual.final_weighted_accuracy(rows, _samples_E(found.tallies)[:seen])


def _samples_E(tallies: Sequence[Tally]) -> tuple[int, ...]:
    """Test samples of each experience; those whose data are gone in the last evaluation had some in an earlier one."""
    return tuple(map(max, zip(*(tally.samples_E for tally in tallies), strict=True)))


OWN_METRICS: Final[Mapping[str, Metric]] = {
    "final_average_accuracy": Metric(
        label="final average accuracy", column="final", compared=True, tag="1_progress/accuracy",
        score=lambda found: continual.final_average_accuracy(found.accuracy_TE),
        running=lambda found: continual.average_seen_accuracy(found.accuracy_TE),
    ),
    "final_average_accuracy_task_aware": Metric(
        label="final average accuracy, task-aware", column="task-aware", tag="continual/accuracy_task_aware",
        score=lambda found: continual.final_average_accuracy(found.accuracy_aware_TE),
        running=lambda found: continual.average_seen_accuracy(found.accuracy_aware_TE),
    ),
    "final_weighted_accuracy": Metric(
        label="final accuracy over all samples", tag="continual/accuracy_over_all_samples",
        score=lambda found: continual.final_weighted_accuracy(found.accuracy_TE, _samples_E(found.tallies)),
        running=_weighted_so_far,
    ),
    "average_incremental_accuracy": Metric(
        label="average incremental accuracy", column="incremental", compared=True,
        score=lambda found: continual.average_incremental_accuracy(found.accuracy_TE),
    ),
    "learning_accuracy": Metric(
        label="learning accuracy",
        score=lambda found: continual.learning_accuracy(found.accuracy_TE),
    ),
    "forgetting": Metric(
        label="forgetting", column="forgetting", compared=True, better="lower", tag="1_progress/forgetting",
        score=lambda found: continual.forgetting(found.accuracy_TE),
    ),
    "backward_transfer": Metric(
        label="backward transfer", column="backward",
        score=lambda found: continual.backward_transfer(found.accuracy_TE),
    ),
    "forward_transfer": Metric(
        label="forward transfer",
        score=lambda found: continual.forward_transfer(found.accuracy_TE, found.baseline_E),
    ),
}  # fmt: skip



def _negative(score: Score) -> Score:
    return Score(-score.value, score.undefined)


def _perplexity(score: Score) -> Score:
    return Score(perplexity(-score.value), score.undefined) if not score.undefined else score


TOKEN_METRICS: Final[Mapping[str, Metric]] = {
    "final_perplexity": Metric(
        label="final perplexity", column="perplexity", compared=True, better="lower", kind="decimal", per_token=True,
        tag="1_progress/perplexity",
        score=lambda found: _perplexity(continual.final_average_accuracy(found.log_likelihood_TE)),
        running=lambda found: _perplexity(continual.average_seen_accuracy(found.log_likelihood_TE)),
    ),
    "final_nats_per_token": Metric(
        label="final nats per token", column="nats/token", compared=True, better="lower", kind="fine", per_token=True,
        tag="1_progress/nats_per_token",
        score=lambda found: _negative(continual.final_average_accuracy(found.log_likelihood_TE)),
        running=lambda found: _negative(continual.average_seen_accuracy(found.log_likelihood_TE)),
    ),
    "learning_nats": Metric(
        label="nats per token just after learning", better="lower", kind="fine", per_token=True,
        score=lambda found: _negative(continual.learning_accuracy(found.log_likelihood_TE)),
    ),
    "forgetting_nats": Metric(
        label="forgetting, nats per token", column="forgetting", compared=True, better="lower", kind="fine",
        per_token=True, tag="1_progress/forgetting_nats",
        score=lambda found: continual.forgetting(found.log_likelihood_TE),
    ),
    "backward_transfer_nats": Metric(
        label="backward transfer, nats per token", column="backward", kind="fine", per_token=True,
        score=lambda found: continual.backward_transfer(found.log_likelihood_TE),
    ),
    "forward_transfer_nats": Metric(
        label="forward transfer, nats per token", kind="fine", per_token=True,
        score=lambda found: continual.forward_transfer(found.log_likelihood_TE, found.baseline_log_likelihood_E),
    ),
}
"""Of language models: the metrics of classifiers on the matrix of log-likelihoods, which rise as accuracies do; losses
of them are positive, as forgetting is. Domains have the same weight, so the final perplexity is the geometric mean of
those of the domains."""

for _name, _metric in {**OWN_METRICS, **TOKEN_METRICS}.items():
    METRICS.add(_name, _metric)


def all_metrics() -> dict[str, Metric]:
    """Return every metric by name: clframe's in the order of this file, then others in alphabetical order."""
    found = dict(METRICS.items())
    return {**{name: found[name] for name in (*OWN_METRICS, *TOKEN_METRICS)}, **found}


def metrics_of(tallies: Sequence[Tally]) -> dict[str, Metric]:
    """Return the metrics that are defined for these evaluations: those of tokens for language models only."""
    by_token = bool(tallies) and bool(tallies[-1].nats_E)
    return {name: metric for name, metric in all_metrics().items() if by_token or not metric.per_token}


def scores(
    tallies: Sequence[Tally], *, baseline: Tally | None = None, running: bool = False
) -> dict[str, Score]:
    """Compute every metric from one evaluation per training experience.

    A metric of another package that fails is NaN with the error as its reason: the numbers of a finished run are
    worth more than one metric.

    Args:
        tallies: One evaluation per training experience.
        baseline: An evaluation before any training, for forward transfer.
        running: Whether to compute what TensorBoard draws after each experience instead of the final value.

    Raises:
        ClframeError: No evaluations, or evaluations that differ in shape.

    >>> tally = Tally(((4, 0), (0, 2)), correct_EC=((3, 0), (0, 1)), correct_aware_EC=((4, 0), (0, 2)))
    >>> scores([tally])["final_average_accuracy"].value, scores([tally])["forgetting"].undefined
    (0.625, 'needs two experiences, found one')
    """
    _check_shapes([*tallies, baseline] if baseline else tallies, found=len(tallies))
    found = Evaluations(tallies, baseline)
    return {
        name: _score((running and metric.running) or metric.score, found)
        for name, metric in metrics_of(tallies).items()
    }


def _score(compute: Callable[[Evaluations], Score | float], found: Evaluations) -> Score:
    try:
        score = compute(found)
        score = score if isinstance(score, Score) else Score(float(score))
    except ClframeError:
        raise
    except Exception as error:
        return Score(NAN, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return score if score.undefined or score.value == score.value else Score(NAN, "no reason given")


def _check_shapes(tallies: Sequence[Tally], *, found: int) -> None:
    if not found:
        raise ClframeError("evaluations: none; evaluate after every training experience")
    shapes = sorted({tally.total_EC.shape for tally in tallies})
    if len(shapes) > 1:
        raise ClframeError(f"evaluations: shapes {shapes} (experiences, classes); evaluate one set of them")
