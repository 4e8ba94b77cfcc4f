"""Tables of what a prediction costs, and of the neurons and experts that it uses."""

from __future__ import annotations

from collections.abc import Sequence

from clframe.accounting import Ledger
from clframe.reporting.report.loading import Run
from clframe.reporting.report.statistics import NAN
from clframe.reporting.report.table import Cell, Quantity, Table

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
