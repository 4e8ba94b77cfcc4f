"""TensorBoard's pages of a run so far: scalars and pictures after an experience, hyper-parameters at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clframe.accounting import Ledger
from clframe.data.benchmark import Benchmark
from clframe.metrics.confusion import MOST_SHOWN
from clframe.training.learner import Learner
from clframe.training.pictures import draw_pictures, exit_usage, figures_of
from clframe.training.prediction_cost import policy_of
from clframe.training.run_progress import Progress
from clframe.training.tensorboard import TensorBoard

if TYPE_CHECKING:
    from clframe.plotting.style import PixelArray


def write_scalars(board: TensorBoard, progress: Progress, learner: Learner, ledger: Ledger) -> None:
    """Write the metrics and costs after the newest experience."""
    names = learner.network.exit_names
    board.evaluation(progress.tallies, baseline=progress.baseline)
    costs, newest = ledger.predictions, progress.finished - 1
    macs, policy = costs.mean(experience=newest), policy_of(learner)
    board.predictions(costs, macs=macs, experience=newest, names=names, policy=policy is not None)
    board.activity(progress.activity)
    board.exits(progress.exits, names=names)
    board.write_layout(progress.finished)


def write_pictures(
    board: TensorBoard, progress: Progress, learner: Learner, ledger: Ledger, benchmark: Benchmark
) -> dict[str, PixelArray]:
    """Draw the results so far; returns those pictures that are figures of the run folder as well, by name."""
    names, known = learner.network.exit_names, benchmark.class_names
    accuracy_TE = [tally.accuracy_E for tally in progress.tallies]
    usage: list[list[float]] = []
    if policy_of(learner) is not None:
        usage = exit_usage(ledger.predictions, names=names, experiences=range(progress.finished))
    shown = progress.confusion_CC is not None and len(progress.confusion_CC) <= MOST_SHOWN
    found = draw_pictures(
        accuracy_TE, names=names, exits=progress.exits, usage=usage, activity=progress.activity,
        confusion=progress.confusion_CC.tolist() if shown and progress.confusion_CC is not None else (),
        classes=[known[c] if c < len(known) else str(c) for c in benchmark.class_order],
    )  # fmt: skip
    board.pictures(found, accuracy_TE=accuracy_TE)
    return figures_of(found)


def write_hyper_parameters(
    board: TensorBoard, progress: Progress, ledger: Ledger, *,
    values: Mapping[str, Any], metrics: Mapping[str, float], last: int,
) -> None:  # fmt: skip
    """Write options, final metrics and costs after experience ``last`` to the HParams page."""
    costs = {"macs_per_prediction": ledger.predictions.mean(experience=last)}
    if progress.activity:
        costs["sparsity"] = progress.activity[-1].sparsity
    board.hyper_parameters(values, metrics={**metrics, **costs}, step=last)
