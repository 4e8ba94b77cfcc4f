"""Tables, figure and files of an evaluation."""

from __future__ import annotations

from math import isnan
from pathlib import Path

from clframe.exits import output
from clframe.exits.curves import wilson_interval
from clframe.exits.failure import undefined_reason
from clframe.plotting.images import class_shares
from clframe.plotting.style import render_picture
from clframe.report.confusion import confused_table, confusion_picture, counts_table
from clframe.tables import Cell, Quantity, Table, to_csv
from clframe.targets.evaluation import Evaluation, Interval, to_json
from clframe.targets.folders import write_files

MOST_SHOWN = 12
"""Classes up to which all are shown on a terminal; beyond it the least accurate ones and the most confused pairs."""


def describe(found: Evaluation) -> str:
    """Summary in a few lines."""
    classes = len(found.classes)
    known = classes + len(found.unseen)
    lines = [
        f"{found.data}: {found.samples:,} samples of {classes} classes" + (f" (of {known})" if found.unseen else ""),
        f"accuracy {_percent(found.accuracy)} % (95 % CI {_interval(found.interval)})",
        f"MACs per prediction {found.macs:,.0f}, {100 * found.macs / found.backbone_macs:.1f} % of the backbone"
        + (" (simulated)" if found.simulated else ""),
        f"rule: {found.rule}",
    ]
    if found.unseen:
        shown = ", ".join(found.unseen[:10]) + (", ..." if len(found.unseen) > 10 else "")
        lines.append(f"classes without samples: {shown}")
    if found.simulated:
        lines.append(f"MACs are simulated: {found.simulated}")
    return "\n".join([*lines, *found.notes])


def shown_tables(found: Evaluation) -> list[Table]:
    """The tables for a terminal."""
    few = len(found.classes) <= MOST_SHOWN
    tables = [exits_table(found), confidence_table(found), classes_table(found, most=MOST_SHOWN)]
    if found.confusion:
        tables.append(_counts(found) if few else _confused(found))
    return tables


def all_tables(found: Evaluation) -> list[Table]:
    """The tables for files."""
    tables = [
        exits_table(found), output.metrics_table(found.exits), output.intervals_table(found.exits), classes_table(found)
    ]  # fmt: skip
    if found.experiences:
        tables.append(experiences_table(found))
    return [*tables, *([_counts(found), _confused(found)] if found.confusion else [])]


def exits_table(found: Evaluation) -> Table:
    """Accuracy and cost of every exit, and the share of samples that it decided."""
    accuracy_K = found.exits.metrics["accuracy"]
    rows: list[tuple[Cell, ...]] = []
    for k, name in enumerate(found.exits.exit_names):
        limits = wilson_interval(round(accuracy_K[k] * found.samples), found.samples)
        rows.append((
            name, Quantity(accuracy_K[k]), _interval(limits), Quantity(found.decided_K[k] / found.samples),
            Quantity(found.macs_K[k], kind="whole"),
        ))  # fmt: skip
    columns = ("exit", "accuracy, %", "95 % CI, %", "decides, %", "MACs up to it")
    return Table(
        name="exits", title="Accuracy of each exit on all samples", note=_decision_costs(found), columns=columns,
        rows=tuple(rows),
    )  # fmt: skip


def _decision_costs(found: Evaluation) -> str:
    """Costs of decisions where stages and heads are not all of them; empty elsewhere."""
    pairs = list(zip(found.decision_macs_K, found.macs_K, found.decided_K, strict=True))
    if not any(cost > macs and decided for cost, macs, decided in pairs):
        return ""
    names = found.exits.exit_names
    costs = ", ".join(f"{names[k]} {cost:,}" for k, (cost, _, decided) in enumerate(pairs) if decided)
    return (
        f"MACs up to it are those of stages and heads. With the confidence measure, corrections and ensembles, which "
        f"the mean includes, a decision costs: {costs}."
    )


def confidence_table(found: Evaluation) -> Table:
    """The main metrics of calibration and failure prediction of every exit, with intervals where there are some."""
    study = found.exits
    names = ("ece", "auroc", "aurc", "eefp", "brier", "nll")
    rows: list[tuple[Cell, ...]] = []
    for k, exit_name in enumerate(study.exit_names):
        cells: list[Cell] = []
        for name in names:
            value, limits = study.metrics[name][k], study.intervals.get(name)
            reason = undefined_reason(name, study.metrics, exit=k) if isnan(value) else ""
            cell = Quantity(value, kind="fine" if name in output.DECIMALS else "percent", undefined=reason)
            interval = "" if limits is None or isnan(limits[k][0]) else f" ({_interval(limits[k])})"
            cells.append(cell if isnan(value) else f"{cell}{interval}")
        rows.append((exit_name, *cells))
    return Table(
        name="confidence", title="Confidence of each exit: calibration and failure prediction, 95 % CI in brackets",
        columns=("exit", *(output.HEADINGS[name] for name in names)), rows=tuple(rows),
    )  # fmt: skip


def classes_table(found: Evaluation, *, most: int | None = None) -> Table:
    """Accuracy by class; beyond ``most`` classes the least accurate ones."""
    classes = list(found.classes)
    title = "Accuracy by class"
    if most is not None and len(classes) > most:
        classes = sorted(classes, key=lambda one: (one.accuracy, one.class_id))[:most]
        title = f"Accuracy by class: the {most} least accurate of {len(found.classes)}"
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (one.name, Quantity(one.samples, kind="whole"), Quantity(one.accuracy), _interval(one.interval))
        for one in classes
    )
    return Table(name="classes", title=title, columns=("class", "samples", "accuracy, %", "95 % CI, %"), rows=rows)


def experiences_table(found: Evaluation) -> Table:
    """Accuracy by test experience."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (f"experience {e + 1}", Quantity(n, kind="whole"), Quantity(right / n), _interval(wilson_interval(right, n)))
        for e, (n, right) in enumerate(found.experiences)
        if n
    )
    columns = ("test data", "samples", "accuracy, %", "95 % CI, %")
    return Table(name="experiences", title="Accuracy by experience", columns=columns, rows=rows)


def write_folder(found: Evaluation, folder: Path) -> Path:
    """Write tables (CSV), the confusion matrix (SVG, PNG) and, last, ``evaluation.json``; returns the path of the last.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    files: dict[str, str | bytes] = {f"{table.name}.csv": to_csv(table) for table in all_tables(found)}
    if found.confusion:
        shares_CC = class_shares(found.confusion)
        picture = render_picture(confusion_picture(shares_CC, found.class_names, prefix="", seeds=1))
        files |= {"confusion_matrix.svg": picture.svg, "confusion_matrix.png": picture.png}
    files["evaluation.json"] = to_json(found)
    write_files(folder, files)
    return folder / "evaluation.json"


def _counts(found: Evaluation) -> Table:
    return counts_table(found.confusion, found.class_names)


def _confused(found: Evaluation) -> Table:
    return confused_table(class_shares(found.confusion), found.confusion, found.class_names)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(limits: Interval) -> str:
    return f"{_percent(limits[0])} to {_percent(limits[1])}"
