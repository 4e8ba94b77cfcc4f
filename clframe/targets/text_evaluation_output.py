"""Tables and files of the evaluation of a language model."""

from __future__ import annotations

from pathlib import Path

from clframe.functional.language import perplexity
from clframe.tables import Cell, Quantity, Table, to_csv
from clframe.targets.folders import write_files
from clframe.targets.text_evaluation import TextEvaluation, to_json


def describe(found: TextEvaluation) -> str:
    """Summary in a few lines."""
    share = f"{100 * found.macs / found.backbone_macs:.1f} % of the backbone"
    domains = "1 domain" if len(found.domains) == 1 else f"{len(found.domains)} domains"
    lines = [
        f"{found.data}: {found.tokens:,} tokens of {domains}, in windows of {found.context}",
        f"perplexity {found.perplexity:.2f}, {found.nats:.4f} nats per token (mean over domains)",
        f"MACs per token {found.macs:,.0f}, {share}",
    ]
    if found.waiting:
        total = found.macs + found.waiting
        lines.append(
            f"with what later tokens need of earlier ones after their exits: {total:,.0f}, "
            f"{100 * total / found.backbone_macs:.1f} %"
        )
    return "\n".join([*lines, f"rule: {found.rule}", *found.notes])


def tables(found: TextEvaluation) -> list[Table]:
    """The table of the domains, and that of the exits where there are several."""
    return [domains_table(found), *([exits_table(found)] if len(found.exit_names) > 1 else [])]


def domains_table(found: TextEvaluation) -> Table:
    """Perplexity and accuracy of each domain."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            domain.name, Quantity(domain.tokens, kind="whole"), Quantity(domain.perplexity, kind="decimal"),
            Quantity(domain.nats, kind="fine"), f"{domain.interval[0]:.3f} to {domain.interval[1]:.3f}",
            Quantity(domain.accuracy),
        )
        for domain in found.domains
    )  # fmt: skip
    columns = ("domain", "tokens", "perplexity", "nats per token", "95 % CI", "next-token accuracy, %")
    return Table(name="domains", title="Scores of each domain", columns=columns, rows=rows)


def exits_table(found: TextEvaluation) -> Table:
    """Perplexity of each exit on each domain, its cost, and the share of tokens that it decided."""
    rows: list[tuple[Cell, ...]] = []
    for k, name in enumerate(found.exit_names):
        scores = [Quantity(perplexity(domain.nats_K[k]), kind="decimal") for domain in found.domains]
        decides, macs = Quantity(found.decided_K[k] / found.tokens), Quantity(found.macs_K[k], kind="whole")
        rows.append((name, *scores, decides, macs))
    columns = ("exit", *(domain.name for domain in found.domains), "decides, %", "MACs up to it")
    return Table(name="exits", title="Perplexity of each exit on all tokens", columns=columns, rows=tuple(rows))


def write_folder(found: TextEvaluation, folder: Path) -> Path:
    """Write the tables (CSV) and, last, ``evaluation.json``; returns its path.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    files: dict[str, str | bytes] = {f"{table.name}.csv": to_csv(table) for table in tables(found)}
    write_files(folder, {**files, "evaluation.json": to_json(found)})
    return folder / "evaluation.json"
