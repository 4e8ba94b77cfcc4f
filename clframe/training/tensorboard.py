"""Names on TensorBoard: the tags of the first page, what counts in training steps, and the Custom Scalars page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.accounting import Predictions
from clframe.exits.diagnostics import ExitRecord, forgetting_by_exit
from clframe.exits.plots import exit_images, who_answers_image
from clframe.metrics import continual
from clframe.metrics.tally import Tally
from clframe.plotting.images import matrix_image, matrix_markdown
from clframe.sparsity.activity import ActivityRecord
from clframe.sparsity.output import activity_image, short
from clframe.training.event_files import keep, let_a_second_pass

if TYPE_CHECKING:
    from clframe.plotting.images import PixelArray


PROGRESS = "1_progress"
"""The group that answers how it is going; TensorBoard sorts by name, digits first, and opens the first groups."""
PICTURES = "2_pictures"
"""The group of images behind it."""
LOSS = f"{PROGRESS}/loss"
"""Tag of the sum of all loss terms."""
THROUGHPUT = f"{PROGRESS}/samples_per_second"
"""Tag of the samples trained on a second."""
LEARNING_RATE = "train/learning_rate"
"""Tag of the learning rate."""

CHARTS: Mapping[str, Mapping[str, str]] = {
    "progress": {
        "accuracy over the experiences so far": rf"{PROGRESS}/accuracy$",
        "forgetting": rf"{PROGRESS}/forgetting$",
        "losses by term": r"loss/.+",
        "MACs of a prediction": rf"{PROGRESS}/macs_per_prediction$",
        "exits used": r"exits_used/.+",
        "inactive neurons by layer": r"sparsity/.+",
        "experts per token by layer": r"experts_per_token/.+",
        "samples per second": rf"{THROUGHPUT}$",
    },
    "experiences": {
        "accuracy per experience": r"experience_accuracy/\d+$",
        "active neurons kept since learnt": r"neurons_kept/.+",
        "active neurons shared with earlier experiences": r"neurons_shared/.+",
        "task-aware accuracy and backward transfer": r"continual/.+",
    },
    "exits": {
        "accuracy per exit": r"exit_accuracy/.+",
        "forgetting per exit": r"exit_forgetting/.+",
        "decisions": r"exit_decision/.+",
        "accuracy at a share of the cost in %": r"exit_accuracy_at_cost/.+",
        "who answers at half the cost": r"exit_share_50/.+",
        "similarity of taps": r"exit_similarity/.+",
    },
    "training": {
        "learning rate": rf"{LEARNING_RATE}.*",
    },
}
"""Charts of the Custom Scalars page by category: a regular expression for their tags, matched from the start."""


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """The Custom Scalars page with those charts that have something to show, as ``SummaryWriter`` takes it.

    >>> layout(["loss/task/ce", "train/learning_rate"])["training"]
    {'learning rate': ['Multiline', ['train/learning_rate.*']]}
    """
    written = tuple(tags)
    found: dict[str, dict[str, list[object]]] = {}
    for category, charts in CHARTS.items():
        for title, pattern in charts.items():
            if any(re.match(pattern, tag) for tag in written):
                found.setdefault(category, {})[title] = ["Multiline", [pattern]]
    return found


def in_steps(tag: str) -> bool:
    """Whether a tag's x is the training step; it is the number of the experience otherwise."""
    return tag in (LOSS, THROUGHPUT) or tag.startswith(("loss/", "train/"))


def written_anew(tag: str) -> bool:
    """Whether a tag is one that every session of a run writes again: the layout, hyper-parameters, final metrics."""
    return tag.startswith(("custom_scalars__", "_hparams_/", "final/"))


class TensorBoard:
    """Writes one run's event file; ``tensorboard --logdir runs`` shows it.

    What was logged after ``finished`` experiences of ``steps`` training steps by a run that died is taken out of its
    event files first: it is trained and written again.

    Args:
        folder: The run's own folder for event files; runs are told apart by folder.
        experiences: Test experiences of the benchmark, which sets the width of their numbers in tags.
        finished: Experiences that are not trained again.
        steps: Their training steps.
    """

    def __init__(self, folder: str | Path, *, experiences: int, finished: int = 0, steps: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        def keeps(tag: str, step: int) -> bool:
            return not written_anew(tag) and (step <= steps if in_steps(tag) else step < finished)

        self._tags = dict.fromkeys(keep(Path(folder), keeps))
        let_a_second_pass(Path(folder))
        self._digits = max(2, len(str(experiences - 1)))
        self._writer: Any = SummaryWriter(str(folder))
        self._layout: dict[str, Any] = {}
        self.lay_out(finished)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write each value under its tag at training step ``step``; NaN and infinity are drawn as such."""
        for tag, value in values.items():
            self._tags[tag] = None
            self._writer.add_scalar(tag, float(value), step)

    def evaluation(self, tallies: Sequence[Tally]) -> None:
        """Write the newest evaluation, given those after every training experience so far.

        x is the number of the newest experience, ``len(tallies) - 1``. All evaluations are needed because
        forgetting looks back; a resumed run hands over those of its checkpoint too. Experiences still to come
        are in the matrix only: TensorBoard smooths its curves, and zeros before the first true value would
        bend them for the rest of the run.
        """
        experience = len(tallies) - 1
        accuracy_TE = [tally.accuracy_E for tally in tallies]
        aware_TE = [tally.accuracy_aware_E for tally in tallies]
        for j, accuracy in enumerate(accuracy_TE[-1][: experience + 1]):
            self._number(f"experience_accuracy/{j:0{self._digits}d}", accuracy, experience)
        for tag, score in (
            (f"{PROGRESS}/accuracy", continual.average_seen_accuracy(accuracy_TE)),
            (f"{PROGRESS}/forgetting", continual.forgetting(accuracy_TE)),
            ("continual/accuracy_task_aware", continual.average_seen_accuracy(aware_TE)),
            ("continual/backward_transfer", continual.backward_transfer(accuracy_TE)),
        ):
            self._number(tag, score.value, experience)
        self._image(f"{PICTURES}/accuracy_matrix", matrix_image(accuracy_TE), experience)
        self._writer.add_text(f"{PICTURES}/accuracy_matrix", matrix_markdown(accuracy_TE), experience)

    def predictions(
        self, costs: Predictions, *, macs: float, experience: int, names: Sequence[str], policy: bool
    ) -> None:
        """Write what a prediction costs after experience ``experience``, and which exits answer where a policy decides.

        Args:
            costs: What was noted after each experience so far.
            macs: Mean MACs of a prediction, see :func:`~clframe.training.prediction_cost.mean_macs`.
            experience: The newest one.
            names: The exits' names, in order of depth.
            policy: Whether samples may leave early; all exits are computed otherwise.
        """
        self._number(f"{PROGRESS}/macs_per_prediction", macs, experience)
        counts = [costs.samples_by_exit(experience=e) for e in range(experience + 1)]
        counts = [found for found in counts if any(found.values())]
        if not policy or not counts:
            return
        shares_EK = [[found.get(name, 0) / sum(found.values()) for name in names] for found in counts]
        for k, share in enumerate(shares_EK[-1]):
            self._number(f"exits_used/{self._exit(k, names)}", share, experience)
        picture = who_answers_image(shares_EK, names=names, title="exits used")
        self._image(f"{PICTURES}/exits_used", picture, experience)

    def activity(self, records: Sequence[ActivityRecord]) -> None:
        """Write what hidden neurons and experts do after the newest experience; nothing where there are none."""
        experience, record = len(records) - 1, records[-1]
        self._number(f"{PROGRESS}/sparsity", record.sparsity, experience)
        self._number(f"{PROGRESS}/experts_per_token", record.experts_per_token, experience)
        for n, (name, layer) in enumerate(record.layers.items()):
            self._number(f"sparsity/{n:02d}_{short(name)}", layer.sparsity, experience)
            self._number(f"neurons_kept/{n:02d}_{short(name)}", layer.kept, experience)
            self._number(f"neurons_shared/{n:02d}_{short(name)}", layer.overlap, experience)
        for n, (name, experts) in enumerate(record.experts.items()):
            self._number(f"experts_per_token/{n:02d}_{short(name)}", experts.per_token, experience)
            self._number(f"experts_unused/{n:02d}_{short(name)}", experts.unused, experience)
        picture = activity_image(records)
        if picture is not None:
            self._image(f"{PICTURES}/neurons", picture, experience)

    def exits(self, records: Sequence[ExitRecord], *, names: Sequence[str]) -> None:
        """Write what every exit came to after the newest experience; a network with one exit has nothing to add.

        ``names`` are the exits' names, in order of depth.
        """
        if len(names) == 1:
            return
        experience, record = len(records) - 1, records[-1]
        forgetting_K = forgetting_by_exit([[r.accuracy_KE[k] for r in records] for k in range(len(names))])
        for k in range(len(names)):
            label = self._exit(k, names)
            self._number(f"exit_accuracy/{label}", record.diagnostics.accuracy_K[k], experience)
            self._number(f"exit_forgetting/{label}", forgetting_K[k].value, experience)
            self._number(f"exit_similarity/{label}", record.similarity_K[k], experience)
        for point, share_K in zip(record.points.points or (), record.share_PK, strict=True):
            at = point.name.rstrip("%")
            self._number(f"exit_accuracy_at_cost/{at}", point.accuracy, experience)
            for k, share in enumerate(share_K):
                self._number(f"exit_share_{at}/{self._exit(k, names)}", share, experience)
        for rule, accuracy in record.static.items():
            self._number(f"exit_decision/{rule}", accuracy, experience)
        self._number("exit_decision/overthinking", record.diagnostics.overthinking, experience)
        for name, picture in exit_images(records, names=names).items():
            tag = f"{PICTURES}/accuracy_and_cost" if name == "curve" else f"exits/{name}"
            self._image(tag, picture, experience)

    def lay_out(self, finished: int) -> None:
        """Write what is waiting, and the Custom Scalars page where charts have come up that it lacks.

        The last page of a run is the one that is shown.
        """
        from torch.utils.tensorboard.summary import custom_scalars

        untyped: Any = custom_scalars
        found = layout(self._tags)
        if found != self._layout:
            self._layout = found
            self._writer.file_writer.add_summary(untyped(found), finished)
        self._writer.flush()

    def hyper_parameters(self, values: Mapping[str, Any], *, metrics: Mapping[str, float], step: int) -> None:
        """Write the options of the run and its final metrics for the HParams page, into this very run.

        Nested mappings become dotted names, what is neither number nor text becomes text. A metric ``m``
        is written as the scalar ``final/m`` at ``step``, the number of the last experience, unless it is NaN.
        """
        from torch.utils.tensorboard.summary import hparams

        final = {f"final/{name}": value for name, value in metrics.items() if not math.isnan(value)}
        # SummaryWriter.add_hparams would open a second run beside this one and write the metrics there
        untyped: Any = hparams
        for summary in untyped(dict(_flat(values)), final):
            self._writer.file_writer.add_summary(summary)
        self.scalars(final, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is waiting and close the file; closing twice is fine."""
        self._writer.close()

    def _exit(self, k: int, names: Sequence[str]) -> str:
        return f"{k:0{self._digits}d}_{names[k]}"

    def _number(self, tag: str, value: float, experience: int) -> None:
        if not math.isnan(value):  # not evaluated or not defined yet: no point, rather than a point at NaN
            self.scalars({tag: value}, experience)

    def _image(self, tag: str, picture: PixelArray, experience: int) -> None:
        self._writer.add_image(tag, picture, experience, dataformats="HWC")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
        else:  # flags too: torch writes them as the numbers 0 and 1
            yield f"{prefix}{name}", str(value)
