"""Metrics of continual learning as pure functions of the accuracy matrix.

``accuracy_TE[i][j]`` is the accuracy on test experience j after training on experience i, NaN where it
was not evaluated; T rows, E columns, both counted from 0. A domain-incremental stream has the same classes in
every experience and the same matrix. Every experience has the same weight unless the name contains "weighted".

A metric that the matrix does not define is NaN with a reason; it is never 0 by default, and a missing accuracy
is never skipped: a mean over fewer experiences would be a different number under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clframe.errors import ClframeError

Matrix = Sequence[Sequence[float]]
"""Accuracies from 0 to 1: rows after experience i, columns test experience j."""

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Score:
    """A number, or NaN and the reason why it is undefined.

    >>> float(Score(0.5)), Score(NAN, "one experience").undefined
    (0.5, 'one experience')
    """

    value: float
    undefined: str = ""
    """Why ``value`` is NaN; empty where it is a number."""

    def __float__(self) -> float:
        return self.value


def final_average_accuracy(accuracy_TE: Matrix) -> Score:
    """Compute the mean accuracy over all test experiences after the last training experience.

    ``1/E sum_j A[T-1, j]``: ACC of Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017).

    >>> final_average_accuracy([[1.0, 0.0], [0.5, 0.75]]).value
    0.625
    """
    rows, columns = _shape(accuracy_TE)
    return _mean((rows - 1, j, accuracy_TE[rows - 1][j]) for j in range(columns))


def final_weighted_accuracy(accuracy_TE: Matrix, samples_E: Sequence[int]) -> Score:
    """Compute the accuracy over all test samples after the last training experience.

    ``sum_j n_j A[T-1, j] / sum_j n_j`` with ``n_j`` the samples of test experience j: every sample
    has the same weight, as in one test set of all classes.
    """
    rows, columns = _shape(accuracy_TE)
    _one_each("samples_E", len(samples_E), columns)
    nonempty = [j for j in range(columns) if samples_E[j]]
    if not nonempty:
        return Score(NAN, "there are no test samples")
    last = accuracy_TE[rows - 1]
    missing = _missing((rows - 1, j, last[j]) for j in nonempty)
    return Score(NAN, missing) if missing else Score(
        math.fsum(samples_E[j] * last[j] for j in nonempty) / sum(samples_E)
    )


def average_seen_accuracy(accuracy_TE: Matrix) -> Score:
    """Compute the mean accuracy over the experiences seen so far, after the last row's experience.

    ``1/|S| sum_{j in S} A[T-1, j]`` with S the test experiences ``j <= T-1``; at the end of a stream it is
    :func:`final_average_accuracy`. Source: A_k of Chaudhry et al., "Riemannian Walk" (2018).
    """
    rows, columns = _shape(accuracy_TE)
    return _mean((rows - 1, j, accuracy_TE[rows - 1][j]) for j in range(min(rows, columns)))


def average_incremental_accuracy(accuracy_TE: Matrix) -> Score:
    """Compute the mean over training experiences of the mean accuracy on the experiences seen by then.

    ``1/T sum_i mean_{j <= i} A[i, j]``, the first experience included. Source: Rebuffi et al., "iCaRL"
    (2017); there the inner mean is over samples, here over experiences, the same for equal sizes.

    >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 0.75]]).value
    0.8125
    """
    rows, _ = _shape(accuracy_TE)
    seen = [average_seen_accuracy(accuracy_TE[: i + 1]) for i in range(rows)]
    missing = next((score for score in seen if score.undefined), None)
    return missing or Score(math.fsum(score.value for score in seen) / rows)


def forgetting_E(accuracy_TE: Matrix) -> tuple[Score, ...]:
    """Compute forgetting by experience: the best accuracy before the last experience minus the final one.

    ``f_j = max_{i in j..T-2} A[i, j] - A[T-1, j]`` for ``j < T-1``, negative where the last experience
    improved it. Source: Chaudhry et al., "Riemannian Walk" (2018), with the maximum taken from the time the
    experience is learned. (Avalanche's forgetting is ``A[j, j] - A[T-1, j]``, minus our backward transfer.)

    >>> [score.value for score in forgetting_E([[0.75, 0.0], [0.5, 1.0]])]
    [0.25, nan]
    """
    rows, columns = _shape(accuracy_TE)
    return tuple(_lost(accuracy_TE, j, rows) for j in range(columns))


def forgetting(accuracy_TE: Matrix) -> Score:
    """Compute the mean of :func:`forgetting_E` over the experiences before the last, ``j < T-1``."""
    rows, columns = _shape(accuracy_TE)
    if rows < 2:
        return Score(NAN, "needs two experiences, found one")
    lost = forgetting_E(accuracy_TE)[: min(rows - 1, columns)]
    missing = next((score for score in lost if score.undefined), None)
    return missing or Score(math.fsum(score.value for score in lost) / len(lost))


def backward_transfer(accuracy_TE: Matrix) -> Score:
    """Compute the mean change of each experience's accuracy since it was learned; negative means forgetting.

    ``mean_{j < T-1} A[T-1, j] - A[j, j]``: BWT of Lopez-Paz and Ranzato (2017).
    """
    rows, columns = _shape(accuracy_TE)
    if rows < 2:
        return Score(NAN, "needs two experiences, found one")
    old = range(min(rows - 1, columns))
    return _mean_difference([(rows - 1, j, accuracy_TE[rows - 1][j]) for j in old],
                            [(j, j, accuracy_TE[j][j]) for j in old])  # fmt: skip


def forward_transfer(accuracy_TE: Matrix, baseline_E: Sequence[float] | None) -> Score:
    """Compute the mean accuracy on an experience just before it is learned, minus that at random initialization.

    ``mean_{1 <= j < T} A[j-1, j] - b_j``: FWT of Lopez-Paz and Ranzato (2017), ``baseline_E`` being
    their b_j. A class without an output is always wrong, so on the task-agnostic matrix of a class-incremental
    stream the first term is 0: the metric is meaningful for domain-incremental streams.
    """
    rows, columns = _shape(accuracy_TE)
    if baseline_E is None:
        return Score(NAN, "accuracy at random initialization was not evaluated")
    _one_each("baseline_E", len(baseline_E), columns)
    new = range(1, min(rows, columns))
    if not new:
        return Score(NAN, "needs two experiences, found one")
    return _mean_difference([(j - 1, j, accuracy_TE[j - 1][j]) for j in new],
                            [(-1, j, baseline_E[j]) for j in new])  # fmt: skip


def learning_accuracy(accuracy_TE: Matrix) -> Score:
    """Compute the mean accuracy on each experience just after it was learned.

    ``mean_j A[j, j]``: LA of Riemer et al., "Learning to Learn without Forgetting" (2019).
    """
    rows, columns = _shape(accuracy_TE)
    return _mean((j, j, accuracy_TE[j][j]) for j in range(min(rows, columns)))


def _shape(accuracy_TE: Matrix) -> tuple[int, int]:
    widths = {len(row) for row in accuracy_TE}
    if len(widths) != 1 or 0 in widths:
        raise ClframeError(
            f"accuracy matrix: {len(accuracy_TE)} rows of widths {sorted(widths)}; "
            f"give at least one row, each with one accuracy per test experience"
        )
    return len(accuracy_TE), widths.pop()


def _one_each(where: str, found: int, columns: int) -> None:
    if found != columns:
        raise ClframeError(f"{where}: {found} entries for {columns} test experiences; give one each")


def _lost(accuracy_TE: Matrix, j: int, rows: int) -> Score:
    past = [(i, j, accuracy_TE[i][j]) for i in range(j, rows - 1)]
    if not past:
        return Score(NAN, "no experience came after it")
    last = (rows - 1, j, accuracy_TE[rows - 1][j])
    missing = _missing([*past, last])
    return Score(NAN, missing) if missing else Score(max(a for _, _, a in past) - last[2])


def _mean(entries: Iterable[tuple[int, int, float]]) -> Score:
    entries = list(entries)
    missing = _missing(entries)
    return Score(NAN, missing) if missing else Score(math.fsum(a for _, _, a in entries) / len(entries))


def _mean_difference(after: list[tuple[int, int, float]], before: list[tuple[int, int, float]]) -> Score:
    missing = _missing([*after, *before])
    if missing:
        return Score(NAN, missing)
    return Score(math.fsum([*(a for _, _, a in after), *(-a for _, _, a in before)]) / len(after))


def _missing(entries: Iterable[tuple[int, int, float]]) -> str:
    for i, j, accuracy in entries:
        if math.isnan(accuracy):
            when = f"after experience {i}" if i >= 0 else "before training"
            return f"experience {j} was not evaluated {when}"
    return ""
