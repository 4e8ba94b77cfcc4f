"""TensorBoard: one writer for a run, with a fixed set of tags and a first page made to be read.

| tag | x | what |
|---|---|---|
| ``loss/<component>/<term>``, ``train/learning_rate`` | step | what the engine hands to ``scalars`` |
| ``cl/average_accuracy``, ``cl/average_accuracy_task_aware`` | experience | mean over the experiences seen |
| ``cl/forgetting``, ``cl/backward_transfer`` | experience | from the second experience on |
| ``cl/accuracy_matrix`` | experience | the matrix as an image, and as Markdown under Text |
| ``experience_accuracy/00`` ... | experience | accuracy on each test experience, from when it was learnt |
| ``exit_accuracy/<exit>``, ``exit_forgetting/<exit>`` | experience | each exit alone |
| ``exit_decision/<rule>`` | experience | accuracy when all exits decide, and overthinking |
| ``exit_accuracy_at_cost/50``, ``exit_share_50/<exit>`` | experience | at a budget in %: accuracy, who answers |
| ``exit_similarity/<exit>`` | experience | CKA of the exit's tap with that after the first experience |
| ``exits/...`` | experience | figures |
| ``final/<metric>`` | last experience | the metrics that the HParams page compares runs by |
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.metrics import continual
from clframe.metrics.continual import Matrix
from clframe.metrics.exit_record import ExitRecord
from clframe.metrics.exits import forgetting_by_exit
from clframe.metrics.tally import Tally
from clframe.training.exit_figures import exit_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEARNING_RATE = "train/learning_rate"
"""Tag of the learning rate."""

LAYOUT = {
    "continual learning": {
        "accuracy per experience": ["Multiline", [r"experience_accuracy/\d+$"]],
        "average accuracy": ["Multiline", [r"cl/average_accuracy$"]],
        "forgetting": ["Multiline", [r"cl/forgetting$"]],
    },
    "training": {
        "losses by term": ["Multiline", [r"loss/.+"]],
        "learning rate": ["Multiline", [rf"{LEARNING_RATE}.*"]],
    },
}
"""The Custom Scalars page; tags are regular expressions matched from the start."""

EXIT_LAYOUT = {
    "exits": {
        "accuracy per exit": ["Multiline", [r"exit_accuracy/.+"]],
        "forgetting per exit": ["Multiline", [r"exit_forgetting/.+"]],
        "decisions": ["Multiline", [r"exit_decision/.+"]],
        "accuracy at a share of the cost in %": ["Multiline", [r"exit_accuracy_at_cost/.+"]],
        "who answers at half the cost": ["Multiline", [r"exit_share_50/.+"]],
        "similarity of taps": ["Multiline", [r"exit_similarity/.+"]],
    },
}
"""Its charts for a network with more than one exit."""

LARGEST_WITH_DIGITS = 30
"""Experiences up to which the matrix's image has its numbers drawn in."""


class TensorBoard:
    """Writes one run's event file; ``tensorboard --logdir runs`` shows it.

    Args:
        folder: The run's own folder for event files; runs are told apart by folder.
        experiences: Test experiences of the benchmark, which sets the width of their numbers in tags.
        purge_step: First training step that is trained again after a resume: what was logged from there on
            by the run that died is dropped. Evaluations are counted in experiences and are not dropped; one
            that is repeated is drawn twice, at the same place.
    """

    def __init__(self, folder: str | Path, *, experiences: int, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if purge_step is not None:
            _let_a_second_pass(Path(folder))
        self._digits = max(2, len(str(experiences - 1)))
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)
        self._writer.add_custom_scalars(LAYOUT)
        self._shows_exits = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write each value under its tag at training step ``step``; NaN and infinity are drawn as such."""
        for tag, value in values.items():
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
            ("cl/average_accuracy", continual.average_seen_accuracy(accuracy_TE)),
            ("cl/average_accuracy_task_aware", continual.average_seen_accuracy(aware_TE)),
            ("cl/forgetting", continual.forgetting(accuracy_TE)),
            ("cl/backward_transfer", continual.backward_transfer(accuracy_TE)),
        ):
            self._number(tag, score.value, experience)
        self._writer.add_image("cl/accuracy_matrix", matrix_image(accuracy_TE), experience, dataformats="HWC")
        self._writer.add_text("cl/accuracy_matrix", matrix_markdown(accuracy_TE), experience)
        self._writer.flush()

    def exits(self, records: Sequence[ExitRecord], *, names: Sequence[str]) -> None:
        """Write what every exit came to after the newest experience; a network with one exit has nothing to add.

        ``names`` are the exits' names, in order of depth.
        """
        if len(names) == 1:
            return
        if not self._shows_exits:  # the last layout of a run is the one that is shown
            self._writer.add_custom_scalars({**LAYOUT, **EXIT_LAYOUT})
            self._shows_exits = True
        experience, record = len(records) - 1, records[-1]
        forgetting_K = forgetting_by_exit([[r.accuracy_KE[k] for r in records] for k in range(len(names))])
        for k, name in enumerate(names):
            label = f"{k:0{self._digits}d}_{name}"
            self._number(f"exit_accuracy/{label}", record.diagnostics.accuracy_K[k], experience)
            self._number(f"exit_forgetting/{label}", forgetting_K[k].value, experience)
            self._number(f"exit_similarity/{label}", record.similarity_K[k], experience)
        for point, share_K in zip(record.points.points or (), record.share_PK, strict=True):
            at = point.name.rstrip("%")
            self._number(f"exit_accuracy_at_cost/{at}", point.accuracy, experience)
            for k, share in enumerate(share_K):
                self._number(f"exit_share_{at}/{k:0{self._digits}d}_{names[k]}", share, experience)
        for rule, accuracy in record.static.items():
            self._number(f"exit_decision/{rule}", accuracy, experience)
        self._number("exit_decision/overthinking", record.diagnostics.overthinking, experience)
        for tag, image in exit_images(records, names=names).items():
            self._writer.add_image(f"exits/{tag}", image, experience, dataformats="HWC")
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

    def _number(self, tag: str, value: float, experience: int) -> None:
        if not math.isnan(value):  # not evaluated or not defined yet: no point, rather than a point at NaN
            self._writer.add_scalar(tag, value, experience)


def matrix_image(accuracy_TE: Matrix) -> NDArray[np.uint8]:
    """The accuracy matrix as a picture (height, width, 3): a heat map from 0 to 1 with percents drawn in."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # never pyplot, which keeps figures and picks a backend globally

    matrix_TE = np.asarray(accuracy_TE, dtype=float)
    rows, columns = matrix_TE.shape
    digits = columns <= LARGEST_WITH_DIGITS
    inch = 0.5 if digits else 15 / columns
    figure = Figure(figsize=(max(4.0, columns * inch + 2), max(2.5, rows * inch + 1.2)), dpi=100)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_invalid(matrix_TE), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="test experience", ylabel="after experience", title="accuracy in %")
    if digits:
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows))
        for (i, j), accuracy in np.ndenumerate(matrix_TE):
            text = "-" if np.isnan(accuracy) else f"{100 * accuracy:.0f}"
            dark = not np.isnan(accuracy) and accuracy < 0.6
            axes.text(j, i, text, ha="center", va="center", fontsize=11, color="white" if dark else "black")
    figure.tight_layout()
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def matrix_markdown(accuracy_TE: Matrix) -> str:
    """The accuracy matrix in percent as a Markdown table, numbers to copy; ``-`` where not evaluated.

    >>> print(matrix_markdown([[1.0, float("nan")], [0.5, 0.75]]))
    | after | 0 | 1 |
    |---|---|---|
    | **0** | 100.0 | - |
    | **1** | 50.0 | 75.0 |
    """
    columns = range(len(accuracy_TE[0]))
    lines = [f"| after | {' | '.join(str(j) for j in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i, row in enumerate(accuracy_TE):
        cells = ("-" if math.isnan(accuracy) else f"{100 * accuracy:.1f}" for accuracy in row)
        lines.append(f"| **{i}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def _let_a_second_pass(folder: Path) -> None:
    """Wait, at most a second, until a new event file sorts behind those in ``folder``.

    Files are read in the order of their names, ``events.out.tfevents.<second>...``; a resumed run's file
    must come after the file whose steps it drops.
    """
    seconds = [name.split(".")[3] for name in (path.name for path in folder.glob("events.out.tfevents.*"))]
    if f"{int(time.time()):010d}" in seconds:
        time.sleep(1.0 - time.time() % 1.0)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
        else:  # flags too: torch writes them as the numbers 0 and 1
            yield f"{prefix}{name}", str(value)
