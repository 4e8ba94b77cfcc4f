"""The section of a report that says what a group's predictions cost and what its runs took."""

from __future__ import annotations

from clframe.reporting.report.comparison import Group
from clframe.reporting.report.cost_figures import cost_pictures
from clframe.reporting.report.cost_tables import experiences_table, took_table
from clframe.reporting.report.drawing import Drawn, drawn
from clframe.reporting.report.loading import Run
from clframe.reporting.report.page import Section
from clframe.reporting.report.prediction_tables import (
    activity_table,
    expert_use_table,
    experts_table,
    latency_table,
    parts_table,
    products_table,
    stops_table,
)
from clframe.reporting.report.table import Quantity, Table, over_seeds
from clframe.reporting.report.tables import phases_table, stages_table


def cost_section(group: Group, figures: list[Drawn], tables: dict[str, Table], *, title: str, prefix: str) -> Section:
    """The section; its figures and tables are added to those that become files."""
    first = group.runs[0]
    pictures = [drawn(picture) for picture in cost_pictures(group.runs, prefix=prefix)]
    shown, folded = _of_predictions(first)
    shown.append(took_table(group))
    folded += [phases_table(first)] if first.phase_macs else []
    if first.ledger is not None and first.ledger.entries:
        folded.append(experiences_table(first, first.ledger))
    if first.activity and first.activity[-1].layers:
        folded.append(activity_table(first))
    if first.activity and first.activity[-1].experts:
        folded.append(expert_use_table(first))
    figures += pictures
    tables.update({f"{prefix}{table.name}": table for table in [*shown, *folded]})
    return Section(title=title, intro=_intro(first), pictures=pictures, tables=shown, folded=folded)


def mean_macs(group: Group) -> Quantity | None:
    """Mean MACs of a prediction over seeds; None where no policy and no expert makes it another number than all."""
    ledgers = {run.seed: run.ledger for run in group.runs}
    found = {seed: ledger.predictions.mean() for seed, ledger in ledgers.items() if ledger is not None}
    whole = [ledger.predictions.whole() for ledger in ledgers.values() if ledger is not None]
    if len(found) < len(ledgers) or list(found.values()) == whole or not all(whole):
        return None
    return over_seeds(found, kind="whole", reason="no samples")


def _of_predictions(run: Run) -> tuple[list[Table], list[Table]]:
    """``(shown, folded)``."""
    ledger, shown, folded = run.ledger, list[Table](), list[Table]()
    if ledger is not None and ledger.predictions.parts():
        if ledger.predictions.by_exit():
            shown.append(stops_table(run, ledger))
        if ledger.predictions.products():
            shown.append(products_table(run, ledger))
        if ledger.predictions.experts():
            shown.append(experts_table(run, ledger))
        folded.append(parts_table(run, ledger))
    elif run.stage_macs:
        folded.append(stages_table(run))
    if run.timings is not None:
        shown.append(latency_table(run))
    return shown, folded


def _intro(run: Run) -> str:
    said = []
    if not run.stage_macs and (run.ledger is None or not run.ledger.predictions.parts()):
        said.append("Cost by stage: undefined, ledger.json does not say.")
    if run.timings is None:
        said.append(f"Latency: not measured; clframe latency {run.path} measures it.")
    if run.uncounted:
        said.append(f"Not counted in the costs: {', '.join(run.uncounted)}.")
    return " ".join(said)
