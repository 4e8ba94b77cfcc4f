"""Contents of a report: which sections, figures and tables a set of runs gets."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from clframe.environment import versions
from clframe.metrics.continual import average_seen_accuracy, forgetting
from clframe.metrics.statistics import NAN
from clframe.plotting.style import Picture, RenderedPicture, render_picture
from clframe.report.comparable import choose_base, notices_of, settings_table
from clframe.report.comparison import Group, mismatch
from clframe.report.confusion import confusion_parts
from clframe.report.cost_figures import cost_pictures
from clframe.report.cost_tables import (
    activity_table,
    exit_usage_table,
    experiences_table,
    expert_use_table,
    experts_table,
    latency_table,
    parts_table,
    phases_table,
    products_table,
    run_totals_table,
    stages_table,
)
from clframe.report.exit_sections import exit_sections
from clframe.report.exit_study import exit_study_section
from clframe.report.families import Member, members
from clframe.report.figures import exit_pictures, group_pictures, run_pictures
from clframe.report.language_tables import perplexity_tables
from clframe.report.loading import Run
from clframe.report.page import Fold, Page, Section
from clframe.report.shown_metrics import macs_over_seeds, metric_over_seeds, seeds_text, shown_metrics, trained_once
from clframe.report.strategy_table import exits_compared_table, strategies_table
from clframe.report.tables import differences_table, equal_accuracy_table, groups_table, matrix_table, summary_table
from clframe.report.terminal import skipped_text
from clframe.run_states import RunState
from clframe.tables import Quantity, Table, over_seeds

MANY_RUNS = 60
"""Runs from which a report is a comparison, with the figures of few groups; a figure takes 0.2 s to 0.3 s."""
MOST_FIGURES, MOST_FIGURES_OF_MANY = 60, 16
"""Figures up to which groups get their own: of few runs, and of many."""
MOST_OPEN = 3
"""Groups up to which the sections of a group are not collapsed at first."""


def _cost_section(group: Group, files: Files, *, title: str, prefix: str, drawn: bool) -> Section:
    """Make the section of costs; its figures and tables are added to ``files``."""
    first = group.runs[0]
    pictures = _render(cost_pictures(group.runs, prefix=prefix), drawn=drawn)
    shown, folded = _prediction_tables(first)
    shown.append(run_totals_table(group))
    folded += [phases_table(first)] if first.phase_macs else []
    if first.ledger is not None and first.ledger.entries:
        folded.append(experiences_table(first, first.ledger))
    if first.activity and first.activity[-1].layers:
        folded.append(activity_table(first))
    if first.activity and first.activity[-1].experts:
        folded.append(expert_use_table(first))
    files.add(pictures, [*shown, *folded], prefix=prefix)
    return Section(
        title=title, short="cost", level=2, intro=_missing_costs(first), pictures=pictures, tables=shown, folded=folded
    )


@dataclass(frozen=True)
class Files:
    """Figures and tables of a page that are also written as files, tables by file name."""

    pictures: list[RenderedPicture] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)

    def add(self, pictures: Sequence[RenderedPicture], tables: Sequence[Table], *, prefix: str = "") -> None:
        """Add those of a section; ``prefix`` distinguishes the tables of groups, pictures have it already."""
        self.pictures.extend(pictures)
        self.tables.update({f"{prefix}{table.name}": table for table in tables})


def _render(pictures: Sequence[Picture], *, drawn: bool = True) -> list[RenderedPicture]:
    return [render_picture(picture) for picture in pictures] if drawn else []


def mean_macs(group: Group) -> Quantity | None:
    """Return mean MACs per prediction over seeds; None where every prediction costs the same."""
    ledgers = {run.seed: run.ledger for run in group.runs}
    found = {seed: ledger.predictions.mean() for seed, ledger in ledgers.items() if ledger is not None}
    whole = [ledger.predictions.whole() for ledger in ledgers.values() if ledger is not None]
    if len(found) < len(ledgers) or list(found.values()) == whole or not all(whole):
        return None
    return over_seeds(found, kind="whole", reason="no samples")


def _prediction_tables(run: Run) -> tuple[list[Table], list[Table]]:
    """Return the tables shown at first sight, and those that a reader opens."""
    ledger, shown, folded = run.ledger, list[Table](), list[Table]()
    if ledger is not None and ledger.predictions.parts():
        if ledger.predictions.by_exit():
            shown.append(exit_usage_table(run, ledger))
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


def _missing_costs(run: Run) -> str:
    missing = []
    if not run.stage_macs and (run.ledger is None or not run.ledger.predictions.parts()):
        missing.append("Cost by stage: undefined, not in ledger.json.")
    if run.timings is None:
        missing.append(f"Latency: not measured; clframe latency {run.path} measures it.")
    if run.uncounted:
        missing.append(f"Not counted in the costs: {', '.join(run.uncounted)}.")
    return " ".join(missing)


def make_page(
    groups: Sequence[Group],
    unfinished: Sequence[tuple[Run, RunState]],
    notices: Sequence[str],
    *,
    reference: Group | None = None,
    all_figures: bool = False,
) -> tuple[Page, Files]:
    """Make the page of these runs, and the figures and tables that are also written as files.

    Args:
        groups: Groups of finished runs.
        unfinished: Unfinished runs with their states.
        notices: Texts shown at the top.
        reference: The group that the others are compared with; None compares strategies with exits with the same
            strategy without them, and the tables of differences with the group that most others are comparable with.
        all_figures: Whether all groups get figures; else the first ones, up to :data:`MOST_FIGURES`.
    """
    files = Files()
    sections: list[Section] = []
    drawn = len(groups) if all_figures else _groups_drawn(groups)
    if drawn < len(groups):
        notices = [
            *notices,
            f"Figures are drawn for the first {drawn} of {len(groups)} groups only; --all-figures draws those of all.",
        ]
    if len(groups) > 1:
        base = reference or choose_base(groups)
        sections.append(_comparison(groups, files, reference=reference, base=base))
        notices = [*notices, *notices_of(groups, base)]
    fold: Fold = "never" if len(groups) < 2 else "open" if len(groups) <= MOST_OPEN else "closed"
    for n, group in enumerate(groups):
        prefix = f"group{n + 1}_" if len(groups) + len(unfinished) > 1 else ""
        section, *others = _group(group, files, prefix=prefix, drawn=n < drawn)
        sections += [replace(section, fold=fold), *others]
    for n, (run, state) in enumerate(unfinished):
        prefix = f"unfinished{n + 1}_" if len(groups) + len(unfinished) > 1 else ""
        sections.append(_unfinished(run, state, files, prefix=prefix))
    running = [run for run, state in unfinished if trains(state)]
    paths = ", ".join(str(run.path) for run in running)
    refreshed = f"{paths}; this page is rewritten until the run is finished." if running else ""
    notices = [*notices, *(_why_unfinished(state) for _, state in unfinished if not trains(state))]
    partial = [run for run, _ in unfinished]
    first = groups[0].runs[0] if groups else partial[0]
    page = Page(
        title=_title(groups, partial), subtitle=_subtitle(groups, first),
        made=f"Made by clframe {versions()['clframe']}",
        running=refreshed, notices=_with_losses(notices, [*(run for group in groups for run in group.runs), *partial]),
        sections=sections,
    )  # fmt: skip
    return page, files


def _groups_drawn(groups: Sequence[Group]) -> int:
    """Return how many groups, in their order, get figures; the first one always."""
    total = 0
    most = MOST_FIGURES if sum(len(group.runs) for group in groups) < MANY_RUNS else MOST_FIGURES_OF_MANY
    for n, group in enumerate(groups):
        lists = (run_pictures(group.runs), exit_pictures(group.runs), cost_pictures(group.runs))
        total += sum(map(len, lists)) + all(run.confusion for run in group.runs)
        if total > most:
            return max(1, n)
    return len(groups)


def trains(state: RunState) -> bool:
    """Whether a process writes to the run; one that has finished since it was read is shown as such the next time."""
    return state.state in ("running", "finished")


def _why_unfinished(state: RunState) -> str:
    between = " " if state.state == "stopped" else ": "  # details are a place, or a reason
    return (
        f"{state.path}: {state.state}{between}{state.detail}; clframe run --resume {shlex.quote(str(state.path))} "
        f"continues it."
    )


def _title(groups: Sequence[Group], unfinished: Sequence[Run]) -> str:
    names = sorted({run.name for group in groups for run in group.runs} | {run.name for run in unfinished})
    return ", ".join(names) if len(names) < 4 else f"{len(names)} experiments"


def _subtitle(groups: Sequence[Group], first: Run) -> str:
    backbones = sorted({run.backbone for group in groups for run in group.runs} or {first.backbone})
    what = f"{len(groups)} groups" if len(groups) > 1 else first.strategy
    runs = [run for group in groups for run in group.runs]
    count = f"{len(runs)} run{'s' if len(runs) != 1 else ''}" if runs else "not finished"
    return f"{what} on {first.benchmark}, {', '.join(backbones)}: {count}"


def _with_losses(notices: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Return the notices, and one for every loss that became infinite or NaN."""
    found = list(notices)
    for run in runs:
        bad: dict[str, int] = {}
        for row in run.logged:
            if row.name.startswith("loss/") and not abs(row.value) < float("inf"):
                bad.setdefault(row.name, row.step)
        found += [f"{run.path}: {name} is not finite from step {step} on." for name, step in bad.items()]
        found += [f"{run.path}: diverged, {line}." for line in (run.result.diverged if run.result else ())]
        if run.result and any(run.result.skipped_updates):
            found.append(f"{run.path}: skipped updates, {skipped_text(run.result)}.")
    return found


def _comparison(groups: Sequence[Group], files: Files, *, reference: Group | None, base: Group) -> Section:
    comparable = not any(mismatch(first, second) for first, second in itertools.combinations(groups, 2))
    pictures = _render(group_pictures(groups, comparable=comparable))
    rows: list[Member] = members(groups, reference=reference)
    compared = exits_compared_table(rows)
    shown = [strategies_table(rows, reference=reference), *([compared] if compared is not None else [])]
    folded = [groups_table(groups), differences_table(groups, base), equal_accuracy_table(groups, base)]
    settings = settings_table(groups)
    folded += [] if settings is None else [settings]
    files.add(pictures, [*shown, *folded])
    first = ", the first" if reference is None and base is groups[0] else ""
    return Section(
        title="Comparison", pictures=pictures, tables=shown, folded=folded,
        intro=f"{len(groups)} groups. Paired differences and cost at equal accuracy below are against "
              f"'{base.label}'{first}.",
    )  # fmt: skip


def _group(group: Group, files: Files, *, prefix: str, drawn: bool) -> list[Section]:
    results = group.results
    pictures = _render(run_pictures(group.runs, prefix=prefix), drawn=drawn)
    once = all(map(trained_once, results))
    folded = [summary_table(group), *(() if once else (matrix_table(group.runs),))]
    shown = perplexity_tables(results)
    files.add(pictures, [*shown, *folded], prefix=prefix)
    seeds = f"Seed{'s' if len(group.seeds) > 1 else ''} {seeds_text(group.seeds)}"
    intro = f"{seeds}. Mean ± sample standard deviation over seeds." if len(group.seeds) > 1 else f"{seeds}."
    of = f": {group.label}" if prefix else ""
    exits = _render(exit_pictures(group.runs, prefix=prefix), drawn=drawn)
    about_exits = exit_sections(results, exits, of=of, prefix=prefix)
    for section in about_exits:
        files.add(section.pictures, [*section.tables, *section.folded], prefix=prefix)
    return [
        Section(title=group.label, intro=intro, tiles=_tiles(group), pictures=pictures, tables=shown, folded=folded),
        *about_exits,
        *_confusion_section(group, files, title=f"Confusion matrix{of}", prefix=prefix, drawn=drawn),
        *_exit_study(group, files, title=f"Study of exits{of}", prefix=prefix, drawn=drawn),
        _cost_section(group, files, title=f"Cost{of}", prefix=prefix, drawn=drawn),
        _reproduction(group.runs, title=f"Reproduction{of}"),
    ]


def _exit_study(group: Group, files: Files, *, title: str, prefix: str, drawn: bool) -> list[Section]:
    """Make the section of the study of exits; none where no run of the group has one."""
    section, pictures, tables = exit_study_section(group.runs, title=title, prefix=prefix, drawn=drawn)
    files.add(pictures, tables, prefix=prefix)
    return [] if section is None else [section]


def _confusion_section(group: Group, files: Files, *, title: str, prefix: str, drawn: bool) -> list[Section]:
    """Make the section of the confusion matrix; none where a run has not recorded it."""
    found = confusion_parts(group.results, [run.confusion for run in group.runs], prefix=prefix)
    if found is None:
        return []
    pictures = _render([found.picture], drawn=drawn)
    files.add(pictures, [*found.tables, *found.folded], prefix=prefix)
    return [
        Section(title=title, short="confusion matrix", level=2, intro=found.intro, pictures=pictures,
                tables=found.tables, folded=found.folded)
    ]  # fmt: skip


def _tiles(group: Group) -> list[tuple[str, Quantity, str]]:
    tiles = [
        *((metric.label, metric_over_seeds(group.results, name), "%" if metric.kind == "percent" else "")
          for name, metric in shown_metrics(group.results).items() if metric.compared),
        ("MACs per prediction, whole network", macs_over_seeds(group.results), ""),
        ("state", over_seeds(group.by_seed(lambda r: sum(r.state_bytes.values())), kind="whole"), "bytes"),
        ("training", over_seeds(group.by_seed(lambda r: r.train_seconds), kind="decimal"), "s"),
    ]  # fmt: skip
    at = len(tiles) - 3
    mean = mean_macs(group)
    if mean is not None:
        tiles.insert(at + 1, ("MACs per prediction, mean under the exit policy", mean, ""))
    records = [result.exits[-1] for result in group.results if result.exits]
    if records and len(group.results[0].exit_names) > 1:
        half = {
            result.seed: next((p.accuracy for p in result.exits[-1].points.points or () if p.name == "50%"), NAN)
            for result in group.results
        }
        why = next((r.points.undefined for r in records if r.points.points is None), "") or "the first exit costs more"
        tiles.insert(at, ("accuracy at a budget of 50 %", over_seeds(half, reason=why), "%"))
    return tiles


def _reproduction(runs: Sequence[Run], *, title: str) -> Section:
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
        title=title, short="reproduction", level=2, facts=facts,
        commands=[*commands, "# or, from the resolved config:" if commands else "", *exact],
        texts=[(name, first.config_text)],
    )  # fmt: skip


def _command(environment: Mapping[str, object]) -> str:
    """Return the command that was typed, if it was ``clframe run``; arguments of a script would not repeat the run."""
    words = environment.get("command")
    if not isinstance(words, list) or words[:2] != ["clframe", "run"]:
        return ""
    return shlex.join(map(str, words))


def _listed(found: object) -> str:
    if not isinstance(found, Mapping):
        return "not recorded"
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _unfinished(run: Run, state: RunState, files: Files, *, prefix: str) -> Section:
    pictures = _render([*run_pictures([run], prefix=prefix), *exit_pictures([run], prefix=prefix)])
    rows, total = len(run.accuracy_matrix), run.experiences
    tiles: list[tuple[str, Quantity, str]] = []
    folded = []
    if rows:
        once = total == 1
        seen, lost = average_seen_accuracy(run.accuracy_matrix), forgetting(run.accuracy_matrix)
        tiles = [
            ("experiences finished", Quantity(rows, kind="whole"), f"of {total}"),
            ("average accuracy so far", Quantity(seen.value, undefined=seen.undefined), "%"),
            *(() if once else (("forgetting so far", Quantity(lost.value, undefined=lost.undefined), "%"),)),
        ]
        folded = [] if once else [matrix_table([run])]
    files.add(pictures, folded, prefix=prefix)
    return Section(
        title=f"{'Running' if trains(state) else state.state.capitalize()}: {run.strategy}, seed {run.seed}",
        intro=f"{run.path}. " + ("" if rows else "No experience is finished yet."),
        tiles=tiles, pictures=pictures, folded=folded, texts=[("The whole config", run.config_text)],
    )  # fmt: skip
