"""The section of a report that says what a group's predictions cost and what its runs took."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence

from clframe.environment import versions
from clframe.metrics.continual import average_seen_accuracy, forgetting
from clframe.metrics.statistics import NAN
from clframe.plotting.style import Drawn, drawn
from clframe.report.comparison import Group, mismatch
from clframe.report.cost_figures import cost_pictures
from clframe.report.cost_tables import (
    activity_table,
    experiences_table,
    expert_use_table,
    experts_table,
    latency_table,
    parts_table,
    products_table,
    stops_table,
    took_table,
)
from clframe.report.figures import group_pictures, run_pictures
from clframe.report.loading import Run
from clframe.report.page import Page, Section
from clframe.report.tables import (
    differences_table,
    equal_accuracy_table,
    exits_table,
    groups_table,
    macs,
    matrix_table,
    metric,
    phases_table,
    points_table,
    seeds_text,
    stages_table,
    summary_table,
)
from clframe.tables import Quantity, Table, over_seeds


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
        title=_title(groups, running), subtitle=_subtitle(groups, first),
        made=f"Made by clframe {versions()['clframe']}",
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
