"""Tables of what a run took; what nobody measured says so and has no number."""

from __future__ import annotations

from dataclasses import dataclass

from clframe.accounting import PHASES, Ledger
from clframe.reporting.report.comparison import Group
from clframe.reporting.report.loading import Run
from clframe.reporting.report.prediction_tables import CONVENTION, NOT_MEASURED
from clframe.reporting.report.table import Cell, Kind, Quantity, Table, over_seeds


def experiences_table(run: Run, ledger: Ledger) -> Table:
    """MACs of the run, experience by experience."""
    phases = [phase for phase in PHASES if phase in ledger.by_phase()]
    rows: list[tuple[Cell, ...]] = []
    for index, total in ledger.by_experience().items():
        found = ledger.by_phase(experience=index) if index is not None else _before(ledger)
        seen: list[Cell] = [
            _whole(ledger.samples(experience=index) if index is not None else 0),
            _whole(ledger.samples("replay", experience=index) if index is not None else 0),
            _whole(ledger.steps(experience=index) if index is not None else 0),
        ]
        said = "before any training" if index is None else f"{index}"
        rows.append((said, *(_whole(found.get(phase, 0)) for phase in phases), _whole(total), *seen))
    columns = ("experience", *(f"{phase}, MACs" for phase in phases), "total, MACs", "new samples", "replayed samples",
               "optimizer steps")  # fmt: skip
    note = f"Samples count as often as they were seen. Seed {run.seed}. {CONVENTION}"
    return Table(name="run_cost_by_experience", title="Cost of the run by experience", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def took_table(group: Group) -> Table:
    """What the runs took, each figure with its unit and who says so."""
    found = {run.seed: None if run.ledger is None else _figures(run.ledger) for run in group.runs}
    rows: list[tuple[Cell, ...]] = []
    for n, figure in enumerate(_figures(Ledger())):
        by_seed = {seed: None if figures is None else figures[n] for seed, figures in found.items()}
        values = {seed: one.value for seed, one in by_seed.items() if one is not None and one.value is not None}
        sources = {one.by for one in by_seed.values() if one is not None}
        if len(values) < len(found) or len(sources) > 1:
            rows.append((figure.said, NOT_MEASURED, figure.unit, "-"))
        else:
            rows.append((figure.said, over_seeds(values, kind=figure.kind), figure.unit, sources.pop()))
    timed = any(run.timings is not None for run in group.runs)
    rows.append(
        ("latency of a prediction", "see its table", "ms", "clock") if timed
        else ("latency of a prediction", NOT_MEASURED, "ms", "-")
    )  # fmt: skip
    note = "Nothing is estimated. Energy is read from a real counter (NVML, RAPL) or not there."
    columns = ("what", "value", "unit", "by")
    return Table(name="took", title="What it took", note=note, columns=columns, rows=tuple(rows))


@dataclass(frozen=True, slots=True)
class _Figure:
    said: str
    value: float | None
    """None: not measured."""
    unit: str
    by: str
    kind: Kind = "whole"


def _figures(ledger: Ledger) -> tuple[_Figure, ...]:
    """Every figure of one run, always the same ones in the same order."""
    sizes, seconds, energy = ledger.bytes(), ledger.seconds(), ledger.energy()
    return (
        _Figure("whole run, with evaluations", ledger.macs, "MACs", "counted"),
        _Figure("training", ledger.training_macs, "MACs", "counted"),
        _Figure("new samples seen", ledger.samples(), "samples", "counted"),
        _Figure("replayed samples", ledger.samples("replay"), "samples", "counted"),
        _Figure("optimizer steps", ledger.steps(), "steps", "counted"),
        _Figure("parameters and buffers", sizes.get("parameters"), "bytes", "counted"),
        _Figure("memory of samples", sizes.get("memory", 0), "bytes", "counted"),
        _Figure("teachers", sizes.get("teachers", 0), "bytes", "counted"),
        _Figure("other state of components", sizes.get("components", 0), "bytes", "counted"),
        _Figure("newest checkpoint", sizes.get("checkpoint"), "bytes", "counted"),
        _Figure("peak memory of the process", sizes.get("process_peak"), "bytes", "system"),
        _Figure("peak memory on the device", sizes.get("device_peak"), "bytes", "torch"),
        _Figure("wall time of training", seconds.get("training"), "s", "clock", "fine"),
        _Figure("of it components, before and after the epochs", seconds.get("components", 0.0), "s", "clock", "fine"),
        _Figure("wall time of evaluation", seconds.get("evaluation"), "s", "clock", "fine"),
        _Figure("wall time of keeping accounts", seconds.get("accounting"), "s", "clock", "fine"),
        _Figure("energy of training", energy.joules, "J", energy.energy_source, "fine"),
    )


def _before(ledger: Ledger) -> dict[str, int]:
    """MACs by phase of what belongs to no experience."""
    found: dict[str, int] = {}
    for entry in ledger.entries:
        if entry.experience is None:
            found[entry.phase] = found.get(entry.phase, 0) + entry.macs
    return found


def _whole(value: float) -> Quantity:
    return Quantity(value, kind="whole", undefined=NOT_MEASURED)
