"""TensorBoard event files of a run: tags, the scale of their x axis, and the Custom Scalars page."""

from __future__ import annotations

import math
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.accounting import Predictions
from clframe.exits.diagnostics import ExitRecord, all_exit_metrics, forgetting_by_exit
from clframe.exits.failure import LABELS
from clframe.functional.language import perplexity
from clframe.metrics import Tally, metrics_of, scores
from clframe.plotting.images import matrix_markdown
from clframe.plotting.style import spaced_indices
from clframe.sparsity.activity import ActivityRecord
from clframe.sparsity.plots import short_layer_name
from clframe.training.custom_scalars import Chart, page
from clframe.training.event_files import merge_events, wait_for_next_second
from clframe.training.pictures import PICTURES, exit_usage

if TYPE_CHECKING:
    from clframe.metrics.continual import Matrix
    from clframe.plotting.style import PixelArray


PROGRESS = "1_progress"
"""The group that answers how it is going; TensorBoard sorts by name, digits first, and opens the first groups."""
LOSS = f"{PROGRESS}/loss"
"""Tag of the sum of all loss terms."""
THROUGHPUT = f"{PROGRESS}/samples_per_second"
"""Tag of the samples trained on a second."""
LEARNING_RATE = "train/learning_rate"
"""Tag of the learning rate."""
CURVES = 20
"""Most experiences with a curve of their accuracy, evenly spaced; more are not readable, and their points would grow
with the square of the length of a stream. The accuracy matrix has all."""
LARGEST_TEXT = 50
"""Most experiences of an accuracy matrix that is written as text too."""
GRADIENT_NORM = "gradient/norm"
"""Tag of the norm of the gradient; see :meth:`~clframe.training.loop.StrategyStep.gradient_norm`."""

TRAINING = "training"
"""Category of the curves over training steps. TensorBoard smooths these only: over the few experiences of a stream it
would draw values that were never measured."""
FAILURE = "calibration and failure prediction of exits"
"""Category of the metrics of :data:`~clframe.exits.failure.LABELS`, one chart each."""

CHARTS: Mapping[str, Mapping[str, str]] = {
    "progress": {
        "accuracy over the experiences so far": rf"{PROGRESS}/accuracy$",
        "forgetting": rf"{PROGRESS}/forgetting$",
        "MACs per prediction": rf"{PROGRESS}/macs_per_prediction$",
        "exit usage": r"exits_used/.+",
        "inactive neurons by layer": r"sparsity/.+",
        "experts per token by layer": r"experts_per_token/.+",
    },
    TRAINING: {
        "losses by term": r"loss/.+",
        "samples per second": rf"{THROUGHPUT}$",
        "learning rate": rf"{LEARNING_RATE}.*",
        "gradient norm": rf"{GRADIENT_NORM}$",
    },
    "experiences": {
        "accuracy per experience": r"experience_accuracy/\d+$",
        "active neurons kept since learned": r"neurons_kept/.+",
        "active neurons shared with earlier experiences": r"neurons_shared/.+",
        "further metrics": r"continual/.+",
    },
    "exits": {
        "forgetting per exit": r"exit_forgetting/.+",
        "decisions": r"exit_decision/.+",
        "accuracy within a budget, in % of the cost": r"exit_accuracy_at_cost/.+",
        "exit usage at a budget of 50 %": r"exit_share_50/.+",
        "similarity of taps": r"exit_similarity/.+",
    },
    FAILURE: {},
}
"""Charts of the Custom Scalars page by category: a regular expression for their tags, matched from the start."""


def layout(tags: Iterable[str], *, later: Sequence[str] = ()) -> dict[str, dict[str, Chart]]:
    """The Custom Scalars page with those charts that have something to show.

    Charts list the tags themselves, in order, and those of ``later`` that a chart will get. TensorBoard shows a chart
    of several runs once if they list the same.

    >>> layout(["loss/task/ce", "exits_used/00_a", "exits_used/01_b"])["training"]
    {'losses by term': Chart(tags=['loss/.+'], smoothed=True)}
    """
    written = dict.fromkeys(tags)
    found: dict[str, dict[str, Chart]] = {}
    per_exit: dict[str, dict[str, str]] = {"exits": {}, FAILURE: {}}
    for name, metric in all_exit_metrics().items():
        per_exit[FAILURE if name in LABELS else "exits"][f"{metric.label} per exit"] = rf"exit_{name}/.+"
    for category, charts in {name: {**per_exit.get(name, {}), **own} for name, own in CHARTS.items()}.items():
        for title, pattern in charts.items():
            if any(re.match(pattern, tag) for tag in written):
                shown = sorted(tag for tag in {**written, **dict.fromkeys(later)} if re.match(pattern, tag))
                smoothed = category == TRAINING
                found.setdefault(category, {})[title] = Chart([pattern] if smoothed else shown, smoothed)
    return found


def in_steps(tag: str) -> bool:
    """Whether a tag's x axis is the training step rather than the number of the experience."""
    return tag in (LOSS, THROUGHPUT, GRADIENT_NORM) or tag.startswith(("loss/", "train/"))


def rewritten_by_sessions(tag: str) -> bool:
    """Whether every session of a run writes a tag again: the layout, hyper-parameters, final metrics."""
    return tag.startswith(("custom_scalars__", "_hparams_/", "final/"))


class TensorBoard:
    """Writes one run's event file; ``tensorboard --logdir runs`` shows it.

    On resuming, points of experiences after the first ``finished`` are removed from the event files, and those of
    training steps after ``steps``: they are logged again.

    Args:
        folder: Folder for event files; TensorBoard shows one run per folder.
        experiences: Number of test experiences, which sets the width of their numbers in tags.
        finished: Number of experiences that are not trained again.
        steps: Training steps up to the last log entry that is kept.
    """

    def __init__(self, folder: str | Path, *, experiences: int, finished: int = 0, steps: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        def keeps(tag: str, step: int) -> bool:
            return not rewritten_by_sessions(tag) and (step <= steps if in_steps(tag) else step < finished)

        self._tags = dict.fromkeys(merge_events(Path(folder), keeps))
        wait_for_next_second(Path(folder))
        self._digits = max(2, len(str(experiences - 1)))
        self._curves = spaced_indices(experiences, most=CURVES)
        self._excepthook = threading.excepthook
        threading.excepthook = self._report
        self._writer: Any = SummaryWriter(str(folder))
        self._layout: dict[str, Any] = {}
        self._laid_out = 0
        self.write_layout(finished)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write each value under its tag at training step ``step``; NaN and infinity too."""
        for tag, value in values.items():
            self._tags[tag] = None
            self._writer.add_scalar(tag, float(value), step)

    def evaluation(self, tallies: Sequence[Tally], *, baseline: Tally | None = None) -> None:
        """Write the newest evaluation, given those after every training experience so far.

        x is the number of the newest experience, ``len(tallies) - 1``. Forgetting needs all evaluations, those before
        a resumption included. Future experiences are in the matrix only: TensorBoard smooths its curves, and zeros
        before the first value would distort them for the rest of the run.
        """
        experience = len(tallies) - 1
        accuracy_E = tallies[-1].accuracy_E
        for j in self._curves[: bisect_right(self._curves, experience)]:
            self._number(self._experience_tag(j), accuracy_E[j], experience)
        found = scores(tallies, baseline=baseline, running=True)
        for j, nats in enumerate(tallies[-1].nll_E[: experience + 1]):
            self._number(f"perplexity/{j:0{self._digits}d}", perplexity(nats), experience)
        for name, metric in metrics_of(tallies).items():
            self._number(metric.tag or f"continual/{name}", found[name].value, experience)

    def predictions(
        self, costs: Predictions, *, macs: float, experience: int, names: Sequence[str], policy: bool
    ) -> None:
        """Write the cost of a prediction after experience ``experience`` and, with an exit policy, the exit usage.

        Args:
            costs: Recorded after the experience.
            macs: Mean MACs of a prediction, see :meth:`~clframe.accounting.predictions.Predictions.mean`.
            experience: The newest one.
            names: The exits' names, in order of depth.
            policy: Whether samples may exit early; all exits are computed otherwise.
        """
        self._number(f"{PROGRESS}/macs_per_prediction", macs, experience)
        if policy:
            for share_K in exit_usage(costs, names=names, experiences=[experience]):
                for k, share in enumerate(share_K):
                    self._number(f"exits_used/{self._exit(k, names)}", share, experience)

    def activity(self, records: Sequence[ActivityRecord]) -> None:
        """Write the activity of hidden neurons and experts after the newest experience, if it was recorded."""
        if not records:
            return
        experience, record = len(records) - 1, records[-1]
        self._number(f"{PROGRESS}/sparsity", record.sparsity, experience)
        self._number(f"{PROGRESS}/experts_per_token", record.experts_per_token, experience)
        for n, (name, layer) in enumerate(record.layers.items()):
            self._number(f"sparsity/{n:02d}_{short_layer_name(name)}", layer.sparsity, experience)
            self._number(f"neurons_kept/{n:02d}_{short_layer_name(name)}", layer.kept, experience)
            self._number(f"neurons_shared/{n:02d}_{short_layer_name(name)}", layer.overlap, experience)
        for n, (name, experts) in enumerate(record.experts.items()):
            self._number(f"experts_per_token/{n:02d}_{short_layer_name(name)}", experts.per_token, experience)
            self._number(f"experts_unused/{n:02d}_{short_layer_name(name)}", experts.unused, experience)

    def exits(self, records: Sequence[ExitRecord], *, names: Sequence[str]) -> None:
        """Write the metrics of every exit after the newest experience; nothing for a network with one exit.

        ``names`` are the exits' names, in order of depth.
        """
        if len(names) == 1:
            return
        experience, record = len(records) - 1, records[-1]
        forgetting_K = forgetting_by_exit([[r.accuracy_KE[k] for r in records] for k in range(len(names))])
        for k in range(len(names)):
            label = self._exit(k, names)
            for name, values_K in record.metrics.items():
                self._number(f"exit_{name}/{label}", values_K[k], experience)
            self._number(f"exit_forgetting/{label}", forgetting_K[k].value, experience)
            if record.similarity_K:
                self._number(f"exit_similarity/{label}", record.similarity_K[k], experience)
        for point, share_K in zip(record.points.points or (), record.share_PK, strict=True):
            at = point.name.rstrip("%")
            self._number(f"exit_accuracy_at_cost/{at}", point.accuracy, experience)
            for k, share in enumerate(share_K):
                self._number(f"exit_share_{at}/{self._exit(k, names)}", share, experience)
        for rule, accuracy in record.static.items():
            self._number(f"exit_decision/{rule}", accuracy, experience)
        self._number("exit_decision/overthinking", record.overthinking, experience)

    def pictures(self, found: Mapping[str, PixelArray], *, accuracy_TE: Matrix) -> None:
        """Write pictures by tag, and the accuracy matrix as text, after the newest experience."""
        experience = len(accuracy_TE) - 1
        for tag, picture in found.items():
            self._writer.add_image(tag, picture, experience, dataformats="HWC")
        if len(accuracy_TE[-1]) <= LARGEST_TEXT:
            self._writer.add_text(f"{PICTURES}/accuracy_matrix", matrix_markdown(accuracy_TE), experience)
        self._writer.flush()

    def write_layout(self, finished: int) -> None:
        """Flush, and write the Custom Scalars page again if it lacks a chart.

        TensorBoard shows the last page of a run.
        """
        if len(self._tags) != self._laid_out:  # tags are only added
            self._laid_out = len(self._tags)
            found = layout(self._tags, later=[self._experience_tag(j) for j in self._curves])
            if found != self._layout:
                self._layout = found
                self._writer.file_writer.add_summary(page(found), finished)
        self._writer.flush()

    def flush(self) -> None:
        """Write buffered points to the file."""
        self._writer.flush()

    def hyper_parameters(self, values: Mapping[str, Any], *, metrics: Mapping[str, float], step: int) -> None:
        """Write the options of the run and its final metrics for the HParams page.

        Nested mappings become dotted names; values other than numbers become text. A metric ``m`` is written as the
        scalar ``final/m`` at ``step``, the number of the last experience, unless it is NaN.
        """
        from torch.utils.tensorboard.summary import hparams

        final = {f"final/{name}": value for name, value in metrics.items() if not math.isnan(value)}
        # SummaryWriter.add_hparams would create a second run and write the metrics there.
        untyped: Any = hparams
        for summary in untyped(dict(_flat(values)), final):
            self._writer.file_writer.add_summary(summary)
        self.scalars(final, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file; a second call has no effect."""
        try:
            self._writer.close()
        finally:
            if threading.excepthook == self._report:
                threading.excepthook = self._excepthook

    def _report(self, failure: threading.ExceptHookArgs) -> None:
        """Report what ends a thread, but for a failed write of TensorBoard's, which the next call here raises too."""
        thread = type(failure.thread).__module__.partition(".")[0]
        if thread != "tensorboard" or not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def _experience_tag(self, j: int) -> str:
        return f"experience_accuracy/{j:0{self._digits}d}"

    def _exit(self, k: int, names: Sequence[str]) -> str:
        return f"{k:0{self._digits}d}_{names[k]}"

    def _number(self, tag: str, value: float, experience: int) -> None:
        if not math.isnan(value):  # TensorBoard would draw a point at NaN
            self.scalars({tag: value}, experience)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
        else:  # booleans too, which torch writes as the numbers 0 and 1
            yield f"{prefix}{name}", str(value)
