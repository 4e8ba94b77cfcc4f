"""Tables of costs: of predictions, and of whole runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clframe.accounting import PHASES, Ledger
from clframe.metrics.registry import Kind
from clframe.metrics.statistics import NAN
from clframe.report.comparison import Group
from clframe.report.loading import Run
from clframe.tables import Cell, Quantity, Table, over_seeds

NOT_MEASURED = "not measured"
CONVENTION = "One multiply-add counts 1; FLOPs = 2 x MACs."


def parts_table(run: Run, ledger: Ledger) -> Table:
    """Make a table of the MACs of one prediction by part, in order of execution."""
    found = ledger.predictions
    total, spent, rows = found.whole(), 0, list[tuple[Cell, ...]]()
    for part in found.parts():
        spent += part.macs
        rows.append((part.name, part.kind, part.component or "-", *_share(part.macs, total), _whole(spent)))
    rows.append(("total", "-", "-", *_share(total, total), _whole(total)))
    columns = ("part", "kind", "component", "MACs", "share, %", "MACs up to it")
    note = f"Of a sample that passes all parts with all experts executed; seed {run.seed}. {CONVENTION}"
    return Table(name="cost", title="Cost of a prediction by part", note=note, columns=columns, rows=tuple(rows))


def exit_usage_table(run: Run, ledger: Ledger) -> Table:
    """Make a table of exit usage on test samples, and of the mean cost of a prediction."""
    found = ledger.predictions
    counts, total = found.samples_by_exit(), sum(found.samples_by_exit().values())
    rows: list[tuple[Cell, ...]] = [
        (f"up to {name}", _whole(macs), _whole(counts[name]), Quantity(counts[name] / total if total else NAN))
        for name, macs in found.by_exit().items()
    ]
    half, most = found.quantile(0.5), found.quantile(0.95)
    for name, macs in (("mean", found.expected()), ("median", half), ("95th percentile", most)):
        rows.append((name, _whole(NAN if macs is None else macs), _whole(total), "-"))
    if found.experts():
        rows.append(("mean, executed experts only", _whole(found.mean()), _whole(total), "-"))
    columns = ("prediction", "MACs", "samples", "share, %")
    note = (
        f"Under the run's exit policy, on the test samples of all experiences; earlier heads and the policy count. "
        f"Exact for batches of one sample. Evaluations during the run compute every exit. Seed {run.seed}."
    )
    if found.experts():
        note += f" Executed experts are counted on {max(row.samples for row in found.experts())} test samples."
    return Table(name="exit_usage", title="Expected cost of a prediction", note=note, columns=columns, rows=tuple(rows))


def products_table(run: Run, ledger: Ledger) -> Table:
    """Make a table of dense and effective MACs per sample by role."""
    dense, effective = ledger.predictions.by_role(), ledger.predictions.by_role(count="effective")
    rows: list[tuple[Cell, ...]] = [
        (role, _whole(macs), _whole(effective[role]),
         Quantity(effective[role] / macs if macs else NAN, undefined="the dense network has none"))
        for role, macs in dense.items()
    ]  # fmt: skip
    total, left = sum(dense.values()), sum(effective.values())
    rows.append(("total", _whole(total), _whole(left), Quantity(left / total if total else NAN)))
    samples = max((row.samples for row in ledger.predictions.products()), default=0)
    note = (
        f"Effective: without products with zeros among a layer's inputs; of experts, the executed (token, expert) "
        f"pairs. Counted on {samples} test samples, all exits computed; dense kernels save none of it. "
        f"Seed {run.seed}."
    )
    columns = ("role", "dense MACs per sample", "effective MACs per sample", "effective, %")
    title = "Dense and effective MACs by role"
    return Table(name="products", title=title, note=note, columns=columns, rows=tuple(rows))


def experts_table(run: Run, ledger: Ledger) -> Table:
    """Make a table of router, experts and executed pairs of every layer of experts."""
    rows: list[tuple[Cell, ...]] = [
        (
            row.layer, _whole(row.experts), Quantity(row.pairs / row.tokens if row.tokens else NAN, kind="decimal"),
            _whole(row.router_macs), _whole(row.expert_macs), _whole(row.pairs / row.samples),
            _whole(row.macs / row.samples), _whole(row.dense_macs / row.samples),
            Quantity(row.macs / row.dense_macs if row.dense_macs else NAN),
        )
        for row in ledger.predictions.experts()
    ]  # fmt: skip
    samples = max((row.samples for row in ledger.predictions.experts()), default=0)
    columns = ("layer", "experts", "experts per token", "router, MACs per token", "expert, MACs per pair",
               "pairs per sample", "MACs per sample", "dense MACs per sample", "share, %")  # fmt: skip
    note = (
        f"MACs of the router and of the executed (token, expert) pairs, counted on {samples} test samples, all exits "
        f"computed. Dispatch has no MACs: each pair is gathered and added once. Seed {run.seed}."
    )
    return Table(name="experts", title="Experts", note=note, columns=columns, rows=tuple(rows))


def latency_table(run: Run) -> Table:
    """Make a table of latency and MACs."""
    assert run.timings is not None
    on = run.timings.setting
    rows: list[tuple[Cell, ...]] = [
        (row.way, _whole(row.batch), Quantity(1e3 * row.p50, kind="fine"), Quantity(1e3 * row.p95, kind="fine"),
         _whole(row.throughput), _whole(row.macs))
        for row in run.timings.rows
    ]  # fmt: skip
    columns = ("prediction", "batch", "p50, ms", "p95, ms", "samples per second", "MACs per sample")
    note = (
        f"Measured on {on.device}, {on.threads} threads, {on.dtype}, torch {on.torch}: {on.repeats} calls after "
        f"{on.warmup} warm-up calls, over {on.samples} test samples. exit/NAME: all samples exit there, earlier exits "
        f"are not computed. Seed {run.seed}."
    )
    return Table(name="latency", title="Latency and MACs", note=note, columns=columns, rows=tuple(rows))


def activity_table(run: Run) -> Table:
    """Make a table of the hidden neurons of every layer after the last experience."""
    rows: list[tuple[Cell, ...]] = [
        (name, _whole(layer.neurons), Quantity(layer.sparsity, undefined="no samples"),
         Quantity(layer.kept, undefined="needs two experiences"),
         Quantity(layer.overlap, undefined="needs two experiences"))
        for name, layer in run.activity[-1].layers.items()
    ]  # fmt: skip
    columns = ("layer", "neurons", "inactive, %", "overlap with when learned, %", "overlap with the newest, %")
    note = (
        f"Share of inactive neurons per token; Jaccard overlap of the active neurons of each earlier experience with "
        f"those just after it was learned, and with those of the newest experience. Seed {run.seed}."
    )
    title = "Hidden neurons after the last experience"
    return Table(name="activity", title=title, note=note, columns=columns, rows=tuple(rows))


def expert_use_table(run: Run) -> Table:
    """Make a table of the use of experts after the last experience."""
    rows: list[tuple[Cell, ...]] = [
        (name, _whole(layer.experts), Quantity(layer.per_token, kind="decimal"), _whole(layer.unused),
         Quantity(layer.macs_share))
        for name, layer in run.activity[-1].experts.items()
    ]  # fmt: skip
    columns = ("layer", "experts", "experts per token", "never used", "MACs, % of all experts")
    title, note = "Use of experts after the last experience", f"Seed {run.seed}."
    return Table(name="expert_use", title=title, note=note, columns=columns, rows=tuple(rows))


def _share(macs: int, total: int) -> Sequence[Cell]:
    return _whole(macs), Quantity(macs / total if total else NAN, undefined="nothing was counted")


def _whole(value: float) -> Quantity:
    return Quantity(value, kind="whole", undefined=NOT_MEASURED)


def experiences_table(run: Run, ledger: Ledger) -> Table:
    """Make a table of the MACs of the run by experience and phase."""
    phases = [phase for phase in PHASES if phase in ledger.by_phase()]
    rows: list[tuple[Cell, ...]] = []
    for index, total in ledger.by_experience().items():
        found = ledger.by_phase(experience=index) if index is not None else _before(ledger)
        seen: list[Cell] = [
            _whole(ledger.samples(experience=index) if index is not None else 0),
            _whole(ledger.samples("replay", experience=index) if index is not None else 0),
            _whole(ledger.steps(experience=index) if index is not None else 0),
        ]
        name = "before any training" if index is None else f"{index}"
        rows.append((name, *(_whole(found.get(phase, 0)) for phase in phases), _whole(total), *seen))
    columns = ("experience", *(f"{phase}, MACs" for phase in phases), "total, MACs", "new samples", "replayed samples",
               "optimizer steps")  # fmt: skip
    note = f"Samples are counted each time they are used. Seed {run.seed}. {CONVENTION}"
    return Table(name="run_cost_by_experience", title="Cost of the run by experience", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def run_totals_table(group: Group) -> Table:
    """Make a table of the totals of the runs, each with its unit and source."""
    found = {run.seed: None if run.ledger is None else _totals(run.ledger) for run in group.runs}
    rows: list[tuple[Cell, ...]] = []
    for n, total in enumerate(_totals(Ledger())):
        by_seed = {seed: None if totals is None else totals[n] for seed, totals in found.items()}
        values = {seed: one.value for seed, one in by_seed.items() if one is not None and one.value is not None}
        sources = {one.source for one in by_seed.values() if one is not None}
        if len(values) < len(found) or len(sources) > 1:
            rows.append((total.name, NOT_MEASURED, total.unit, "-"))
        else:
            rows.append((total.name, over_seeds(values, kind=total.kind), total.unit, sources.pop()))
    timed = any(run.timings is not None for run in group.runs)
    rows.append(
        ("latency of a prediction", "see its table", "ms", "clock") if timed
        else ("latency of a prediction", NOT_MEASURED, "ms", "-")
    )  # fmt: skip
    note = "No number is estimated; energy is read from a hardware counter (NVML, RAPL) or omitted."
    columns = ("quantity", "value", "unit", "source")
    return Table(name="run_totals", title="Totals of the run", note=note, columns=columns, rows=tuple(rows))


@dataclass(frozen=True, slots=True)
class _Total:
    name: str
    value: float | None
    """None: not measured."""
    unit: str
    source: str
    kind: Kind = "whole"


def _totals(ledger: Ledger) -> tuple[_Total, ...]:
    """List every total of one run, always the same ones in the same order."""
    sizes, seconds, energy = ledger.bytes(), ledger.seconds(), ledger.energy()
    return (
        _Total("whole run, with evaluations", ledger.macs, "MACs", "counted"),
        _Total("training", ledger.training_macs, "MACs", "counted"),
        _Total("new samples seen", ledger.samples(), "samples", "counted"),
        _Total("replayed samples", ledger.samples("replay"), "samples", "counted"),
        _Total("optimizer steps", ledger.steps(), "steps", "counted"),
        _Total("parameters and buffers", sizes.get("parameters"), "bytes", "counted"),
        _Total("memory of samples", sizes.get("memory", 0), "bytes", "counted"),
        _Total("teachers", sizes.get("teachers", 0), "bytes", "counted"),
        _Total("other state of components", sizes.get("components", 0), "bytes", "counted"),
        _Total("newest checkpoint", sizes.get("checkpoint"), "bytes", "counted"),
        _Total("peak memory of the process", sizes.get("process_peak"), "bytes", "system"),
        _Total("peak memory on the device", sizes.get("device_peak"), "bytes", "torch"),
        _Total("wall time of training", seconds.get("training"), "s", "clock", "fine"),
        _Total("of which components, outside the epochs", seconds.get("components", 0.0), "s", "clock", "fine"),
        _Total("wall time of evaluation", seconds.get("evaluation"), "s", "clock", "fine"),
        _Total("wall time of cost accounting", seconds.get("accounting"), "s", "clock", "fine"),
        _Total("wall time of records of exits", seconds.get("exits"), "s", "clock", "fine"),
        _Total("wall time of records of active neurons", seconds.get("activity", 0.0), "s", "clock", "fine"),
        _Total("wall time of TensorBoard", seconds.get("tensorboard", 0.0), "s", "clock", "fine"),
        _Total("wall time of drawing", seconds.get("figures", 0.0), "s", "clock", "fine"),
        _Total("energy of training", energy.joules, "J", energy.energy_source, "fine"),
    )


def _before(ledger: Ledger) -> dict[str, int]:
    """Sum MACs by phase of entries without an experience."""
    found: dict[str, int] = {}
    for entry in ledger.entries:
        if entry.experience is None:
            found[entry.phase] = found.get(entry.phase, 0) + entry.macs
    return found


def stages_table(run: Run) -> Table:
    """Make a table of the MACs of one prediction by stage."""
    note = "From ledger.json: one multiply-add counts 1; FLOPs = 2 x MACs."
    return _shares_table("cost", "Cost of a prediction by stage", "stage", run.stage_macs, note)


def phases_table(run: Run) -> Table:
    """Make a table of the MACs of the whole run by phase."""
    note = f"Of the run with seed {run.seed}, from ledger.json."
    return _shares_table("run_cost", "Cost of the whole run by phase", "phase", run.phase_macs, note)


def _shares_table(name: str, title: str, heading: str, macs: Mapping[str, int], note: str) -> Table:
    total = sum(macs.values())
    rows: list[tuple[Cell, ...]] = [
        (key, Quantity(n, kind="whole"), Quantity(n / total if total else NAN, undefined="nothing was counted"))
        for key, n in [*macs.items(), ("total", total)]
    ]
    return Table(name=name, title=title, note=note, columns=(heading, "MACs", "share, %"), rows=tuple(rows))
