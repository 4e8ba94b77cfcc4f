"""All scalar metrics of a run by name, from the counts taken after each training experience."""

from __future__ import annotations

from collections.abc import Sequence

from clframe.errors import ClframeError
from clframe.metrics import continual
from clframe.metrics.continual import Score
from clframe.metrics.tally import Tally

METRICS = (
    "final_average_accuracy",
    "final_average_accuracy_task_aware",
    "final_weighted_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
)
"""Names of the scalar metrics: from 0 to 1, differences from -1 to 1."""


def scores(tallies: Sequence[Tally], *, baseline: Tally | None = None) -> dict[str, Score]:
    """Every metric of :data:`METRICS`, in that order.

    All are task-agnostic but the one that says otherwise. ``tallies`` holds one evaluation per training
    experience, ``baseline`` one of the model before any training, which forward transfer needs. Raises
    :class:`ClframeError` where there are no evaluations or where they differ in shape.

    >>> tally = Tally(((4, 0), (0, 2)), correct_EC=((3, 0), (0, 1)), correct_aware_EC=((4, 0), (0, 2)))
    >>> scores([tally])["final_average_accuracy"].value, scores([tally])["forgetting"].undefined
    (0.625, 'needs two experiences, found one')
    """
    _check_shapes([*tallies, baseline] if baseline else tallies, found=len(tallies))
    accuracy_TE = [tally.accuracy_E for tally in tallies]
    aware_TE = [tally.accuracy_aware_E for tally in tallies]
    baseline_E = baseline.accuracy_E if baseline else None
    values = (
        continual.final_average_accuracy(accuracy_TE),
        continual.final_average_accuracy(aware_TE),
        continual.final_weighted_accuracy(accuracy_TE, tallies[-1].samples_E),
        continual.average_incremental_accuracy(accuracy_TE),
        continual.forgetting(accuracy_TE),
        continual.backward_transfer(accuracy_TE),
        continual.forward_transfer(accuracy_TE, baseline_E),
        continual.learning_accuracy(accuracy_TE),
    )
    return dict(zip(METRICS, values, strict=True))


def _check_shapes(tallies: Sequence[Tally], *, found: int) -> None:
    if not found:
        raise ClframeError("evaluations: none; evaluate after every training experience")
    shapes = sorted({(len(tally.total_EC), len(tally.total_EC[0])) for tally in tallies})
    if len(shapes) > 1:
        raise ClframeError(f"evaluations: shapes {shapes} (experiences, classes); evaluate one set of them")
