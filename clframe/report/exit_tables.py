"""Tables of exits over experiences: decisions of all exits, unique accuracy, similarity of representations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from clframe.exits.diagnostics import ExitRecord
from clframe.metrics.statistics import NAN, deviation, mean
from clframe.results import Result
from clframe.tables import Cell, Quantity, Table


def decisions_table(results: Sequence[Result]) -> Table | None:
    """Make one row per experience: accuracy of decisions that use every exit, and overthinking.

    None for runs that did not record them.
    """
    rules = [rule for rule in results[0].exits[-1].static if all(rule in e.static for r in results for e in r.exits)]
    if not rules:
        return None
    names = {"last": "last exit", "confident": "most confident exit", "mean": "mean of probabilities", "vote": "vote"}
    columns = [(names.get(rule, rule), _static(rule)) for rule in rules]
    columns.append(("overthinking", lambda record: record.overthinking))
    note = "Oracle: share of samples that any exit classifies correctly. Overthinking: oracle minus last exit."
    return _by_experience("exit_decisions", "Decisions that use every exit", note, results, columns)


def _static(rule: str) -> Callable[[ExitRecord], float]:
    return lambda record: record.static[rule]


def unique_table(results: Sequence[Result]) -> Table | None:
    """Make one row per experience: the share of samples that each exit alone classifies correctly; None if missing."""
    if not all("unique_accuracy" in record.metrics for result in results for record in result.exits):
        return None
    columns = [(name, _metric("unique_accuracy", k)) for k, name in enumerate(results[0].exit_names)]
    note = "Share of the samples of all experiences so far that this exit classifies correctly and no other one does."
    return _by_experience("unique_accuracy", "Unique accuracy", note, results, columns)


def _metric(name: str, k: int) -> Callable[[ExitRecord], float]:
    return lambda record: record.metrics[name][k]


def similarity_table(results: Sequence[Result]) -> Table | None:
    """Make one row per experience: linear CKA of each exit's tap with itself after the first; None if missing."""
    if not all(record.similarity_K for result in results for record in result.exits):
        return None
    columns = [(name, _similarity(k)) for k, name in enumerate(results[0].exit_names)]
    note = "Unbiased linear CKA of each exit's tap with itself after the first experience, on its test samples."
    return _by_experience("cka", "Similarity of representations (CKA)", note, results, columns)


def _similarity(k: int) -> Callable[[ExitRecord], float]:
    return lambda record: record.similarity_K[k]


def _by_experience(
    name: str, title: str, note: str, results: Sequence[Result],
    columns: Sequence[tuple[str, Callable[[ExitRecord], float]]],
) -> Table:  # fmt: skip
    """Make a table with a row per experience, means over seeds; columns are headings and numbers of a record."""
    rows: list[tuple[Cell, ...]] = []
    for i in range(len(results[0].exits)):
        records = [result.exits[i] for result in results]
        rows.append((f"after {i}", *(_over(records, value) for _, value in columns)))
    if len(results) > 1:
        note += f" Mean ± sample standard deviation over {len(results)} seeds."
    headings = ("", *(f"{heading}, %" for heading, _ in columns))
    return Table(name=name, title=title, note=note, columns=headings, rows=tuple(rows))


def _over(records: Sequence[ExitRecord], value: Callable[[ExitRecord], float]) -> Quantity:
    values = [value(record) for record in records]
    known = not any(math.isnan(one) for one in values)
    return Quantity(mean(values) if known else NAN, deviation=deviation(values), undefined="not recorded")
