"""What stands where in a report: sections of one group, of several, and of a run that goes on."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence

from clframe import __version__
from clframe.metrics.continual import average_seen_accuracy, forgetting
from clframe.reporting.report.comparison import Group, mismatch
from clframe.reporting.report.cost_section import cost_section, mean_macs
from clframe.reporting.report.drawing import Drawn, drawn
from clframe.reporting.report.figures import group_pictures, run_pictures
from clframe.reporting.report.loading import Run
from clframe.reporting.report.page import Page, Section
from clframe.reporting.report.statistics import NAN
from clframe.reporting.report.table import Quantity, Table, over_seeds
from clframe.reporting.report.tables import (
    differences_table,
    equal_accuracy_table,
    exits_table,
    groups_table,
    macs,
    matrix_table,
    metric,
    points_table,
    seeds_text,
    summary_table,
)

Files = tuple[list[Drawn], dict[str, Table]]
"""Every figure, and every table by the name of its files."""


def page_of(groups: Sequence[Group], running: Sequence[Run], notices: Sequence[str]) -> tuple[Page, Files]:
    """The page of these runs, and the figures and tables that also become files."""
    figures: list[Drawn] = []
    tables: dict[str, Table] = {}
    sections: list[Section] = []
    if len(groups) > 1:
        sections.append(_comparison(groups, figures, tables))
    for n, group in enumerate(groups):
        prefix = f"group{n + 1}_" if len(groups) + len(running) > 1 else ""
        sections += _group(group, figures, tables, prefix=prefix)
    for n, run in enumerate(running):
        prefix = f"running{n + 1}_" if len(groups) + len(running) > 1 else ""
        sections.append(_running(run, figures, tables, prefix=prefix))
    paths = ", ".join(str(run.path) for run in running)
    going = f"{paths}; this page is written again as it goes on." if running else ""
    first = groups[0].runs[0] if groups else running[0]
    page = Page(
        title=_title(groups, running), subtitle=_subtitle(groups, first), made=f"Made by clframe {__version__}",
        running=going, notices=_with_losses(notices, [*(run for group in groups for run in group.runs), *running]),
        sections=sections,
    )  # fmt: skip
    return page, (figures, tables)


def _title(groups: Sequence[Group], running: Sequence[Run]) -> str:
    names = sorted({run.name for group in groups for run in group.runs} | {run.name for run in running})
    return ", ".join(names) if len(names) < 4 else f"{len(names)} experiments"


def _subtitle(groups: Sequence[Group], first: Run) -> str:
    backbones = sorted({run.backbone for group in groups for run in group.runs} or {first.backbone})
    what = f"{len(groups)} groups" if len(groups) > 1 else first.strategy
    runs = [run for group in groups for run in group.runs]
    count = f"{len(runs)} run{'s' if len(runs) != 1 else ''}" if runs else "not finished"
    return f"{what} on {first.benchmark}, {', '.join(backbones)}: {count}"


def _with_losses(notices: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The notices, and one for every loss that stopped being a number."""
    found = list(notices)
    for run in runs:
        bad: dict[str, int] = {}
        for row in run.logged:
            if row.name.startswith("loss/") and not abs(row.value) < float("inf"):
                bad.setdefault(row.name, row.step)
        found += [f"{run.path}: {name} is no finite number from step {step} on." for name, step in bad.items()]
    return found


def _comparison(groups: Sequence[Group], figures: list[Drawn], tables: dict[str, Table]) -> Section:
    comparable = not any(mismatch(first, second) for first, second in itertools.combinations(groups, 2))
    pictures = [drawn(picture) for picture in group_pictures(groups, comparable=comparable)]
    shown = [groups_table(groups), differences_table(groups), equal_accuracy_table(groups)]
    figures += pictures
    tables.update({table.name: table for table in shown})
    return Section(
        title="Comparison", intro=f"{len(groups)} groups; each is set against the first, '{groups[0].label}'.",
        pictures=pictures, tables=shown,
    )  # fmt: skip


def _group(group: Group, figures: list[Drawn], tables: dict[str, Table], *, prefix: str) -> list[Section]:
    many = len(group.results[0].exit_names) > 1
    pictures = [drawn(picture) for picture in run_pictures(group.runs, prefix=prefix)]
    shown = [exits_table(group), points_table(group)] if many and group.results[0].exits else []
    folded = [summary_table(group), matrix_table(group.runs)]
    figures += pictures
    tables.update({f"{prefix}{table.name}": table for table in [*shown, *folded]})
    seeds = f"Seed{'s' if len(group.seeds) > 1 else ''} {seeds_text(group.seeds)}"
    intro = f"{seeds}. Mean ± sample standard deviation over seeds." if len(group.seeds) > 1 else f"{seeds}."
    costs = "What it costs" if not prefix else f"What it costs: {group.label}"
    return [
        Section(title=group.label, intro=intro, tiles=_tiles(group), pictures=pictures, tables=shown, folded=folded),
        cost_section(group, figures, tables, title=costs, prefix=prefix),
        _what_was_run(group.runs, title="What was run" if not prefix else f"What was run: {group.label}"),
    ]


def _tiles(group: Group) -> list[tuple[str, Quantity, str]]:
    tiles = [
        ("final average accuracy", metric(group, "final_average_accuracy"), "%"),
        ("average incremental accuracy", metric(group, "average_incremental_accuracy"), "%"),
        ("forgetting", metric(group, "forgetting"), "%"),
        ("MACs a prediction, whole network", macs(group), ""),
        ("state kept", over_seeds(group.by_seed(lambda r: sum(r.state_bytes.values())), kind="whole"), "bytes"),
        ("training", over_seeds(group.by_seed(lambda r: r.train_seconds), kind="decimal"), "s"),
    ]
    spared = mean_macs(group)
    if spared is not None:
        tiles.insert(4, ("MACs a prediction, mean by its own decision", spared, ""))
    records = [result.exits[-1] for result in group.results if result.exits]
    if records and len(group.results[0].exit_names) > 1:
        at = {
            result.seed: next((p.accuracy for p in result.exits[-1].points.points or () if p.name == "50%"), NAN)
            for result in group.results
        }
        why = next((r.points.undefined for r in records if r.points.points is None), "") or "the first exit costs more"
        tiles.insert(3, ("accuracy with half the cost as budget", over_seeds(at, reason=why), "%"))
    return tiles


def _what_was_run(runs: Sequence[Run], *, title: str) -> Section:
    first = runs[0]
    commands = dict.fromkeys(filter(None, (_command(run.environment) for run in runs)))
    machine = first.environment.get("machine")
    facts = [
        ("run folder" if len(runs) == 1 else "run folders", ", ".join(str(run.path) for run in runs)),
        ("versions", _listed(first.result.versions if first.result else first.environment.get("versions"))),
        ("git revision", str(first.environment.get("git_revision") or "not recorded")),
        ("machine", _listed(machine)),
    ]
    exact = [f"clframe run {shlex.quote(str(run.path / 'config.yaml'))}" for run in runs]
    name = "The whole config" if len(runs) == 1 else f"The whole config, of seed {first.seed}"
    return Section(
        title=title, facts=facts, commands=[*commands, "# or, from the resolved config:" if commands else "", *exact],
        texts=[(name, first.config_text)],
    )  # fmt: skip


def _command(environment: Mapping[str, object]) -> str:
    """What was typed, where that was ``clframe run``; a script's own arguments would repeat nothing."""
    words = environment.get("command")
    if not isinstance(words, list) or words[:2] != ["clframe", "run"]:
        return ""
    return shlex.join(map(str, words))


def _listed(found: object) -> str:
    if not isinstance(found, Mapping):
        return "not recorded"
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _running(run: Run, figures: list[Drawn], tables: dict[str, Table], *, prefix: str) -> Section:
    pictures = [drawn(picture) for picture in run_pictures([run], prefix=prefix)]
    figures += pictures
    rows, total = len(run.accuracy_matrix), run.experiences
    tiles: list[tuple[str, Quantity, str]] = []
    folded = []
    if rows:
        seen, lost = average_seen_accuracy(run.accuracy_matrix), forgetting(run.accuracy_matrix)
        tiles = [
            ("experiences finished", Quantity(rows, kind="whole"), f"of {total}"),
            ("average accuracy so far", Quantity(seen.value, undefined=seen.undefined), "%"),
            ("forgetting so far", Quantity(lost.value, undefined=lost.undefined), "%"),
        ]
        folded = [matrix_table([run])]
        tables[f"{prefix}{folded[0].name}"] = folded[0]
    return Section(
        title=f"Running: {run.strategy}, seed {run.seed}",
        intro=f"{run.path}. " + ("" if rows else "No experience is finished yet."),
        tiles=tiles, pictures=pictures, folded=folded, texts=[("The whole config", run.config_text)],
    )  # fmt: skip
