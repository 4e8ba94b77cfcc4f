"""Predictions of a trained model for files, folders, arrays and texts."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, overload

import torch
from PIL import Image

from clframe.accounting import backbone_macs
from clframe.errors import ConfigError, DataError
from clframe.options import format_value
from clframe.printable import csv_cell
from clframe.records import to_json_lines
from clframe.tables import Quantity, Table
from clframe.targets.loading import refuse_language_model
from clframe.targets.reading import InputReader, open_inputs
from clframe.targets.rules import Decisions, PredictionRule
from clframe.training.trained import TrainedModel

SCHEMA_VERSION = 1
_WIDEST = 60  # characters of an input's name in a table


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Prediction for one input."""

    input: str
    """File, or file and row, or text."""
    class_id: int
    """The data set's id of the most probable class."""
    class_name: str
    """Its name; the id where classes have no names."""
    probability: float
    """Softmax of the scores that decided."""
    exit: str
    """Name of the exit that decided."""
    macs: int
    """MACs spent on this input."""
    top: tuple[tuple[str, float], ...]
    """Names and probabilities of the most probable classes, this one first."""


@dataclass(frozen=True, kw_only=True)
class Predictions(Sequence[Prediction]):
    """Predictions in the order of the inputs, and what was skipped.

    >>> found = Predictions(rows=(), skipped={"a.png": "a.png: cannot be read"}, rule="last exit")
    >>> len(found), found.class_names
    (0, [])
    """

    rows: tuple[Prediction, ...]
    skipped: Mapping[str, str]
    """Reason for each input that could not be read, by name."""
    rule: str
    """The rule by which exits decided."""
    threshold: float | None = None
    """Threshold of all exits; None for the strategy's own rule."""
    simulated: str = ""
    """Reason why no exit was skipped, so that ``macs`` are those of a model that could; empty otherwise."""
    notes: tuple[str, ...] = ()
    exit_names: tuple[str, ...] = ()
    backbone_macs: int = 0
    """MACs of the bare backbone with its classifier."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Prediction: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Prediction, ...]: ...
    def __getitem__(self, at: int | slice) -> Prediction | tuple[Prediction, ...]:
        """One prediction, or several."""
        return self.rows[at]

    @property
    def class_ids(self) -> list[int]:
        """The data set's id of the predicted class of each input."""
        return [row.class_id for row in self.rows]

    @property
    def class_names(self) -> list[str]:
        """Name of the predicted class of each input."""
        return [row.class_name for row in self.rows]

    @property
    def mean_macs(self) -> float:
        """Mean MACs of a prediction; NaN without predictions."""
        return sum(row.macs for row in self.rows) / len(self.rows) if self.rows else float("nan")


def predict(
    model: TrainedModel,
    inputs: Any,
    *,
    threshold: float | None = None,
    budget: float | None = None,
    top: int = 1,
    batch_size: int = 64,
    graphs: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Predictions:
    """Predict the class of every input.

    Image files are converted as in training (:mod:`clframe.data.images`), those of another size than the model's are
    resized to cover it and center-cropped. A file that is missing or cannot be read is skipped and named in the result.

    Args:
        model: The model, as ``clframe.load(run)`` returns it.
        inputs: Paths of image files, folders (searched for images at any depth), patterns such as ``photos/**/*.jpg``,
            ``.npz`` files (array ``x``, or the only one) and CSV files (column ``path``); for models of texts, texts,
            ``.txt`` files with one a line, and CSV files (column ``text``). Or a tensor or array as the data set stores
            its inputs.
        threshold: Largest probability from which an exit decides.
        budget: Mean cost as a share of the bare backbone's MACs, with the threshold that the run has recorded.
        top: Number of classes in ``top`` of each prediction.
        batch_size: Inputs per batch.
        graphs: Whether early exit on CUDA uses graphs where they are measured to be faster; predictions are the same.
        progress: Called after each batch with the number of inputs that have been processed, and of all inputs.

    Raises:
        ConfigError: Options out of range, or a budget without a recorded threshold.
        DataError: Nothing to predict, a run folder as an input, or inputs that the model was not trained on.
        UnsupportedError: A threshold or a budget for a model with one exit.
    """
    for name, found in (("--top", top), ("--batch-size", batch_size)):
        if isinstance(found, bool) or not isinstance(found, Integral):
            raise ConfigError(f"{name}: found {format_value(found)}; give a whole number of at least 1")
        if found < 1:
            raise ConfigError(f"{name}: found {found}; give at least 1")
    refuse_language_model(model.network, where="predict", advice="and its methods generate and score take text")
    if not model.learner.past:
        raise DataError("predict: the model has not learned any class yet; finish an experience first")
    rule = PredictionRule(model, threshold=threshold, budget=budget, graphs=graphs)
    reader = open_inputs(model, inputs)
    rows: list[Prediction] = []
    for index, stored in _read(reader, batch_size):
        decisions = rule(model.prepare(stored))
        rows += _rows(model, decisions, [reader.names[at] for at in index], top=top)
        if progress is not None:
            progress(index[-1] + 1, len(reader))
    return Predictions(
        rows=tuple(rows), skipped=dict(reader.skipped), rule=rule.description, threshold=rule.threshold,
        simulated=rule.simulated, notes=tuple(note for note in (rule.note, rule.times, reader.note) if note),
        exit_names=model.network.exit_names, backbone_macs=backbone_macs(model.network),
    )  # fmt: skip


def class_label(model: TrainedModel, class_id: int) -> str:
    """Name of a class; its id where the classes have no names."""
    return model.class_names[class_id] if 0 <= class_id < len(model.class_names) else str(class_id)


def table(found: Predictions) -> Table:
    """One row per input."""
    top = max((len(row.top) for row in found.rows), default=1)
    columns = ("input", "class", "probability, %", *(("next classes, %",) if top > 1 else ()), "exit", "MACs")
    rows = tuple(
        (
            _shorten(row.input), row.class_name, Quantity(row.probability),
            *((", ".join(f"{name} {100 * p:.1f}" for name, p in row.top[1:]),) if top > 1 else ()),
            row.exit, Quantity(row.macs, kind="whole"),
        )
        for row in found.rows
    )  # fmt: skip
    return Table(name="predictions", title=f"Predictions: {found.rule}", columns=columns, rows=rows)


def summary(found: Predictions) -> list[str]:
    """Lines about all predictions: number of inputs by exit, mean cost, and restrictions."""
    counts = {name: sum(row.exit == name for row in found.rows) for name in found.exit_names}
    by_exit = f" ({', '.join(f'{count} at {name}' for name, count in counts.items())})" if len(counts) > 1 else ""
    share = f", {100 * found.mean_macs / found.backbone_macs:.1f} % of the backbone" if found.backbone_macs else ""
    noun = "prediction" if len(found) == 1 else "predictions"
    lines = [f"{len(found)} {noun}{by_exit}; mean MACs {found.mean_macs:,.0f}{share}"]
    if found.simulated:
        lines.append(f"MACs are simulated: {found.simulated}")
    return [*lines, *found.notes]


def to_json(found: Predictions, *, run: str) -> str:
    """All predictions as JSON, one a line."""
    head = {
        "schema_version": SCHEMA_VERSION, "run": run, "rule": found.rule, "threshold": found.threshold,
        "simulated": found.simulated, "notes": found.notes, "exit_names": found.exit_names,
        "backbone_macs": found.backbone_macs, "skipped": found.skipped,
    }  # fmt: skip
    return to_json_lines(head, {"predictions": [_tree(row) for row in found.rows]})


def to_csv(found: Predictions) -> str:
    """All predictions as CSV; with several classes each, their names and probabilities in further columns.

    A name that a spreadsheet would compute, such as ``=A1``, begins with a ``'``.
    """
    top = max((len(row.top) for row in found.rows), default=1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    extra = [name for k in range(2, top + 1) for name in (f"class_{k}", f"probability_{k}")]
    writer.writerow(["input", "class_id", "class", "probability", "exit", "macs", *extra])
    for row in found.rows:
        others = [value for name, probability in row.top[1:] for value in (csv_cell(name), probability)]
        name, exit = csv_cell(row.class_name), csv_cell(row.exit)
        writer.writerow([csv_cell(row.input), row.class_id, name, row.probability, exit, row.macs, *others])
    return text.getvalue()


def _read(reader: InputReader, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    with warnings.catch_warnings():
        # Pillow warns about large images before they are refused: raise instead of warning twice.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield from reader.batches(size)


def _rows(model: TrainedModel, decisions: Decisions, names: Sequence[str], *, top: int) -> list[Prediction]:
    scores_BC, exit_B, macs_B = decisions
    p_BC = scores_BC.float().softmax(1)
    met = int((~scores_BC.isneginf().all(0)).sum())
    p_BT, class_BT = (values.cpu().tolist() for values in p_BC.topk(min(top, met), dim=1))
    # The arg-max of scores, as everywhere else: softmax may round two scores to one probability.
    first_B = scores_BC.argmax(1).tolist()
    rows = []
    for at, name in enumerate(names):
        ids = [model.class_order[c] for c in class_BT[at]]
        best = model.class_order[first_B[at]]
        if ids[0] != best:
            ids = [best, *(c for c in ids if c != best)][: len(ids)]
        rows.append(
            Prediction(
                input=name, class_id=best, class_name=class_label(model, best),
                probability=p_BT[at][0], exit=model.network.exit_names[int(exit_B[at])], macs=int(macs_B[at]),
                top=tuple((class_label(model, c), p) for c, p in zip(ids, p_BT[at], strict=True)),
            )
        )  # fmt: skip
    return rows


def _tree(row: Prediction) -> dict[str, Any]:
    return {
        "input": row.input, "class_id": row.class_id, "class": row.class_name, "probability": row.probability,
        "exit": row.exit, "macs": row.macs, "top": [{"class": name, "probability": p} for name, p in row.top],
    }  # fmt: skip


def _shorten(name: str) -> str:
    """The end of a long path, the start of a long text."""
    if len(name) <= _WIDEST:
        return name
    return f"...{name[3 - _WIDEST:]}" if "/" in name and " " not in name else f"{name[:_WIDEST - 3]}..."
