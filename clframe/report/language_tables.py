"""Tables of language models: perplexity on each domain after each domain, of the network and of its exits."""

from __future__ import annotations

from collections.abc import Sequence

from clframe.functional.language import perplexity
from clframe.metrics.statistics import mean
from clframe.report.shown_metrics import spread_note
from clframe.results import Result
from clframe.tables import Cell, Quantity, Table, over_seeds


def perplexity_table(results: Sequence[Result]) -> Table:
    """Make the perplexity matrix of language models, averaged over seeds: after domain i (rows), on domain j.

    ``so far`` is the exponential of the mean nats per token over the domains learned by then.
    """
    first = results[0]
    domains = _domains(first)
    rows: list[tuple[Cell, ...]] = []
    for i, row in enumerate(first.nll_matrix):
        cells = [_decimal_mean([r.perplexity_matrix[i][j] for r in results]) for j in range(len(row))]
        seen = [perplexity(mean(list(r.nll_matrix[i][: i + 1]))) for r in results]
        rows.append((f"after {domains[i]}", *cells, _decimal_mean(seen)))
    title = "Perplexity: after each domain (rows), on each domain (columns)"
    return Table(
        name="perplexity_matrix", title=title, note=spread_note(len(results)), columns=("", *domains, "so far"),
        rows=tuple(rows),
    )  # fmt: skip


def perplexity_tables(results: Sequence[Result]) -> list[Table]:
    """List the perplexity matrix and, with several exits, those of each exit after the last domain.

    Empty for results of classifiers.
    """
    first = results[0]
    if not all(result.nll_matrix for result in results):
        return []
    if len(first.exit_names) < 2:
        return [perplexity_table(results)]
    domains = _domains(first)
    rows: list[tuple[Cell, ...]] = []
    for k, exit in enumerate(first.exit_names):
        final = [result.exits[-1].nll_KE[k] for result in results]
        cells = [_decimal_mean([perplexity(nll_E[j]) for nll_E in final]) for j in range(len(domains))]
        lost = over_seeds({r.seed: r.exit_forgetting_nats[k] for r in results}, kind="fine", reason="one domain")
        rows.append((exit, *cells, lost))
    each = Table(
        name="exit_perplexity", title="Perplexity of each exit after the last domain", note=spread_note(len(results)),
        columns=("exit", *domains, "forgetting, nats per token"), rows=tuple(rows),
    )  # fmt: skip
    return [perplexity_table(results), each]


def _domains(result: Result) -> list[str]:
    """Name of each experience of a language model: its domains."""
    return [", ".join(result.class_label(c) for c in brought) for brought in result.experiences]


def _decimal_mean(values: Sequence[float]) -> Quantity:
    return over_seeds(dict(enumerate(values)), kind="decimal", reason="not evaluated")
