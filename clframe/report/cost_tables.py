"""Tables of costs: what predictions cost, and what runs took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clframe.accounting import PHASES, Ledger
from clframe.metrics.statistics import NAN
from clframe.report.comparison import Group
from clframe.report.loading import Run
from clframe.tables import Cell, Kind, Quantity, Table, over_seeds

NOT_MEASURED = "not measured"
CONVENTION = "One multiply-add counts 1; FLOPs = 2 x MACs."


def parts_table(run: Run, ledger: Ledger) -> Table:
    """MACs of one prediction, part by part, in the order in which they run."""
    found = ledger.predictions
    total, spent, rows = found.whole(), 0, list[tuple[Cell, ...]]()
    for part in found.parts():
        spent += part.macs
        rows.append((part.name, part.kind, part.component or "-", *_share(part.macs, total), _whole(spent)))
    rows.append(("total", "-", "-", *_share(total, total), _whole(total)))
    columns = ("part", "kind", "component", "MACs", "share, %", "MACs up to it")
    note = f"Of a sample that passes all parts, all experts run; seed {run.seed}. {CONVENTION}"
    return Table(name="cost", title="Cost of a prediction by part", note=note, columns=columns, rows=tuple(rows))


def stops_table(run: Run, ledger: Ledger) -> Table:
    """Where the test samples stop, and what a prediction costs on average."""
    found = ledger.predictions
    counts, total = found.samples_by_exit(), sum(found.samples_by_exit().values())
    rows: list[tuple[Cell, ...]] = [
        (f"up to {name}", _whole(macs), _whole(counts[name]), Quantity(counts[name] / total if total else NAN))
        for name, macs in found.by_exit().items()
    ]
    half, most = found.quantile(0.5), found.quantile(0.95)
    for said, macs in (("mean", found.expected()), ("half stay within", half), ("95 % stay within", most)):
        rows.append((said, _whole(NAN if macs is None else macs), _whole(total), "-"))
    if found.experts():
        rows.append(("mean, of experts those that ran", _whole(found.mean()), _whole(total), "-"))
    columns = ("prediction", "MACs", "samples", "share, %")
    note = (
        f"By the run's own decision, on the test samples of all experiences; heads and policy passed on the way count. "
        f"Exact for one sample after another. Evaluations of the run itself compute every exit. Seed {run.seed}."
    )
    return Table(name="stops", title="Expected cost of a prediction", note=note, columns=columns, rows=tuple(rows))


def products_table(run: Run, ledger: Ledger) -> Table:
    """Dense and effective MACs of a sample by role."""
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
        f"Effective: without products of a zero among a layer's inputs; of experts, the (token, expert) pairs that "
        f"ran. Counted on {samples} test samples, all exits computed; what skips no zeros saves none of it. "
        f"Seed {run.seed}."
    )
    columns = ("role", "dense MACs a sample", "effective MACs a sample", "effective, %")
    title = "Dense and effective MACs by role"
    return Table(name="products", title=title, note=note, columns=columns, rows=tuple(rows))


def experts_table(run: Run, ledger: Ledger) -> Table:
    """Router, pairs and dispatch of every layer of experts."""
    rows: list[tuple[Cell, ...]] = [
        (
            row.layer, _whole(row.experts), Quantity(row.pairs / row.tokens if row.tokens else NAN, kind="decimal"),
            _whole(row.router_macs), _whole(row.expert_macs), _whole(row.pairs / row.samples),
            _whole(row.macs / row.samples), _whole(row.dense_macs / row.samples),
            Quantity(row.macs / row.dense_macs if row.dense_macs else NAN),
        )
        for row in ledger.predictions.experts()
    ]  # fmt: skip
    columns = ("layer", "experts", "experts a token", "router, MACs a token", "expert, MACs a pair", "pairs a sample",
               "MACs a sample", "dense MACs a sample", "share, %")  # fmt: skip
    note = (
        f"MACs are the router's and those of the (token, expert) pairs that ran. Dispatch counts none: each pair is "
        f"gathered and added back once. Seed {run.seed}."
    )
    return Table(name="experts", title="Experts", note=note, columns=columns, rows=tuple(rows))


def latency_table(run: Run) -> Table:
    """Times beside MACs."""
    assert run.timings is not None
    on = run.timings.setting
    rows: list[tuple[Cell, ...]] = [
        (row.way, _whole(row.batch), Quantity(1e3 * row.p50, kind="fine"), Quantity(1e3 * row.p95, kind="fine"),
         _whole(row.throughput), _whole(row.macs))
        for row in run.timings.rows
    ]  # fmt: skip
    columns = ("prediction", "batch", "p50, ms", "p95, ms", "samples a second", "MACs a sample")
    note = (
        f"Measured on {on.device}, {on.threads} threads, {on.dtype}, torch {on.torch}: {on.repeats} calls after "
        f"{on.warmup} to warm up, over {on.samples} test samples. exit/NAME: all samples stop there, no exit before it "
        f"is computed. Seed {run.seed}."
    )
    return Table(name="latency", title="Latency beside MACs", note=note, columns=columns, rows=tuple(rows))


def activity_table(run: Run) -> Table:
    """Hidden neurons of every layer at the end."""
    rows: list[tuple[Cell, ...]] = [
        (name, _whole(layer.neurons), Quantity(layer.sparsity, undefined="no samples"),
         Quantity(layer.kept, undefined="needs two experiences"),
         Quantity(layer.overlap, undefined="needs two experiences"))
        for name, layer in run.activity[-1].layers.items()
    ]  # fmt: skip
    columns = ("layer", "neurons", "inactive, %", "still active since learnt, %", "shared with the newest, %")
    note = (
        f"Share of neurons that a token leaves inactive; overlap (Jaccard) of the active ones with those when each "
        f"earlier experience had just been learnt, and of the newest experience with earlier ones. Seed {run.seed}."
    )
    return Table(name="activity", title="Hidden neurons at the end", note=note, columns=columns, rows=tuple(rows))


def expert_use_table(run: Run) -> Table:
    """Which experts are used at the end."""
    rows: list[tuple[Cell, ...]] = [
        (name, _whole(layer.experts), Quantity(layer.per_token, kind="decimal"), _whole(layer.unused),
         Quantity(layer.macs_share))
        for name, layer in run.activity[-1].experts.items()
    ]  # fmt: skip
    columns = ("layer", "experts", "experts a token", "never used", "MACs, % of all experts")
    return Table(name="expert_use", title="Use of experts at the end", note=f"Seed {run.seed}.", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def _share(macs: int, total: int) -> Sequence[Cell]:
    return _whole(macs), Quantity(macs / total if total else NAN, undefined="nothing was counted")


def _whole(value: float) -> Quantity:
    return Quantity(value, kind="whole", undefined=NOT_MEASURED)


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
