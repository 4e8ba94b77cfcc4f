"""Thresholds of a finished run's exits, solved again without training.

Shape suffixes: K exits, N samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.environment import versions
from clframe.errors import ConfigError, UnsupportedError
from clframe.exits import CONFIDENCE_MEASURES, ExitEvaluation, Method, solve
from clframe.exits.budgets import Solution
from clframe.exits.curves import NO_VALIDATION, wilson_interval
from clframe.exits.decisions import ALWAYS, NEVER, Outcome, evaluate_thresholds
from clframe.exits.policies import Fallback
from clframe.exits.proxy import evaluations
from clframe.exits.study import Progress, collect_scores
from clframe.options import convert_argument
from clframe.records import to_plain
from clframe.tables import Cell, Quantity, Table
from clframe.targets.folders import write_files
from clframe.targets.opening import open_target

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Thresholds for one goal, chosen on validation data, with their outcome on test data."""

    goal: str
    """The goal, for people."""
    budget: float | None
    """Mean cost as a share of the bare backbone's MACs, or None."""
    drop: float | None
    """Allowed loss of validation accuracy against the last exit, or None."""
    thresholds: tuple[float, ...]
    """One for each exit but the last; infinity never fires, minus infinity always."""
    validation_accuracy: float
    validation_cost: float
    """Mean MACs of a prediction as a share of the bare backbone's, as the next one."""
    accuracy: float
    accuracy_low: float
    """Lower end of the 95 % Wilson interval."""
    accuracy_high: float
    cost: float
    share_K: tuple[float, ...]
    """Share of the test samples that each exit predicts."""


@dataclass(frozen=True, kw_only=True)
class ExitPoints:
    """Result of :func:`solve_run`.

    Attributes:
        run: The run.
        measure: Name of the confidence measure.
        solver: Name of the method.
        fallback: Prediction where no exit fires.
        exit_names: Names of the exits, in order of depth.
        cost_K: MACs of a sample up to each exit, with the heads passed, as a share of the bare backbone's.
        validation_samples: Samples that thresholds were chosen on.
        samples: Test samples.
        full_accuracy: Test accuracy of the last exit.
        points: One for each goal.
    """

    run: str
    measure: str
    solver: Method
    fallback: Fallback
    exit_names: tuple[str, ...]
    cost_K: tuple[float, ...]
    validation_samples: int
    samples: int
    full_accuracy: float
    points: tuple[OperatingPoint, ...]


def solve_run(
    run: str,
    *,
    budgets: Sequence[float] = (),
    drops: Sequence[float] = (),
    measure: str = "max_probability",
    solver: Method = "shared",
    fallback: Fallback = "last",
    overrides: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExitPoints:
    """Solve thresholds for budgets and for allowed drops of accuracy on a run's validation data.

    The scores of every exit are those of the newest checkpoint, cached in the run's folder. A measure with parameters
    is fitted on the validation data; the test data only measure the result.

    Args:
        run: A run folder.
        budgets: Mean costs as shares of the bare backbone's MACs.
        drops: Allowed losses of validation accuracy against the last exit, such as 0.01 for one percentage point.
        measure: Name of a confidence measure.
        solver: ``shared``, ``quantiles`` or ``coordinate``, see :func:`~clframe.exits.budgets.solve`.
        fallback: Prediction where no exit fires.
        overrides: New location of the run's data.
        device: cpu, cuda, cuda:N, mps or auto.
        progress: Called with a step's name, what is done and how much there is.

    Raises:
        ConfigError: No goal, one that no thresholds keep, or an unknown measure or solver.
        UnsupportedError: A run with one exit, or without validation or test data.
    """
    CONFIDENCE_MEASURES.get(measure, where="--measure")
    budgets = convert_argument(budgets, tuple[float, ...], where="--budget")
    drops = convert_argument(drops, tuple[float, ...], where="--drop")
    wrong = next((drop for drop in drops if not 0 <= drop < 1), None)
    if wrong is not None:
        raise ConfigError(f"--drop: found {wrong:g}; give a share from 0 to below 1, such as 0.01")
    if not budgets and not drops:
        raise ConfigError("exits: found no goal; give --budget SHARE or --drop SHARE")
    target = open_target(run, overrides=overrides, device=device)
    if target.run is None:
        raise UnsupportedError(f"{run}: not a run; give the folder of a run with exits")
    network = target.run.network
    if len(network.heads) < 2:
        raise UnsupportedError(f"{run}: has one exit only; train with strategy='... + exits'")
    held_out = target.splits.validation
    if held_out is None or not len(held_out):
        raise UnsupportedError(f"{run}: {NO_VALIDATION}; train with benchmark.validation=0.1")
    if not len(target.splits.test):
        raise UnsupportedError(f"{run}: has no test samples; use a benchmark with a test set")
    backbone, cost_K = backbone_macs(network), cumulative_macs(network)
    chosen_on = collect_scores(target, "validation", progress=progress)
    measured_on = collect_scores(target, "test", progress=progress)
    validation, test = evaluations(measure, chosen_on, measured_on, cost_K, method=solver)
    full = evaluate_thresholds(validation, (NEVER,) * (len(cost_K) - 1)).accuracy
    points = []
    for budget in budgets:
        if budget * backbone < cost_K[0]:
            raise ConfigError(f"--budget: found {budget:g}, but the first exit costs {cost_K[0] / backbone:.3f} of the "
                              f"backbone; give at least that")  # fmt: skip
        solution = solve(validation, method=solver, budget=budget * backbone, fallback=fallback)
        points.append(_point(f"budget {100 * budget:g}%", solution, test, backbone, budget=budget))
    for drop in drops:
        solution = solve(validation, method=solver, accuracy=max(0.0, full - drop), fallback=fallback)
        points.append(_point(f"drop {100 * drop:g} points", solution, test, backbone, drop=drop))
    return ExitPoints(
        run=run, measure=measure, solver=solver, fallback=fallback, exit_names=tuple(network.exit_names),
        cost_K=tuple(cost / backbone for cost in cost_K), validation_samples=validation.samples, samples=test.samples,
        full_accuracy=evaluate_thresholds(test, (NEVER,) * (len(cost_K) - 1)).accuracy, points=tuple(points),
    )  # fmt: skip


def _point(
    goal: str, solution: Solution, test: ExitEvaluation, backbone: int, *, budget: float | None = None,
    drop: float | None = None,
) -> OperatingPoint:  # fmt: skip
    chosen: Outcome = solution.validation
    found = evaluate_thresholds(test, solution.thresholds, fallback=chosen.fallback)
    low, high = wilson_interval(round(found.accuracy * test.samples), test.samples)
    return OperatingPoint(
        goal=goal, budget=budget, drop=drop, thresholds=solution.thresholds, validation_accuracy=chosen.accuracy,
        validation_cost=chosen.cost / backbone, accuracy=found.accuracy, accuracy_low=low, accuracy_high=high,
        cost=found.cost / backbone, share_K=found.share_K,
    )  # fmt: skip


def points_table(found: ExitPoints) -> Table:
    """Accuracy, cost and exit usage of every goal on test data."""
    rows: list[tuple[Cell, ...]] = []
    for point in found.points:
        interval = f"{100 * point.accuracy_low:.1f} to {100 * point.accuracy_high:.1f}"
        usage = map(Quantity, point.share_K)
        rows.append((point.goal, Quantity(point.accuracy), interval, Quantity(point.cost), *usage))
    rows.append(("last exit", Quantity(found.full_accuracy), "", Quantity(found.cost_K[-1]),
                 *(Quantity(float(k == len(found.cost_K) - 1)) for k in range(len(found.cost_K)))))  # fmt: skip
    note = (
        f"Thresholds of {found.measure} (solver {found.solver}) chosen on {found.validation_samples:,} validation "
        f"samples, measured on {found.samples:,} test samples. Cost: mean MACs, in % of the backbone without exits."
    )
    return Table(
        name="operating_points", title="Operating points in %", note=note,
        columns=("goal", "accuracy", "95 % CI", "cost", *found.exit_names), rows=tuple(rows),
    )  # fmt: skip


def thresholds_table(found: ExitPoints) -> Table:
    """Threshold of each exit but the last; ``never`` where an exit stops no sample, ``always`` where it stops all."""
    rows: list[tuple[Cell, ...]] = [
        (point.goal, *map(_shown, point.thresholds))
        for point in found.points
    ]
    return Table(name="thresholds", title="Thresholds", columns=("goal", *found.exit_names[:-1]), rows=tuple(rows))


def hint(found: ExitPoints) -> str:
    """Advise where the heads cost more than early exit saves; empty elsewhere."""
    extra = found.cost_K[-1] - 1
    losing = [point for point in found.points if point.cost >= 1]
    if not losing:
        return ""
    names = ", ".join(point.goal for point in losing)
    return (
        f"hint: {names}: a prediction costs {100 * max(point.cost for point in losing):.1f} % of the backbone without "
        f"exits, since the heads add up to {100 * extra:.1f} %; use fewer exits (components.exits.at), a smaller head "
        f"(components.exits.head=pool or linear), or a smaller budget"
    )


def _shown(threshold: float) -> str:
    if threshold == ALWAYS:
        return "always"
    return "never" if threshold > 1 else f"{threshold:.4f}"


def write_points(found: ExitPoints, *, command: Sequence[str], output: str | Path | None = None) -> Path:
    """Write ``operating_points_MEASURE.json`` into the folder ``exits`` of the run, or into ``output``.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    folder = Path(found.run).expanduser() / "exits" if output is None else Path(output).expanduser()
    name = f"operating_points_{found.measure}.json"
    content = {"schema_version": SCHEMA_VERSION, "command": list(command), "versions": versions(), **asdict(found)}
    write_files(folder, {name: json.dumps(to_plain(content), indent=2, ensure_ascii=False) + "\n"})
    return folder / name
