"""The group that others are compared with, and notices about groups that cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence

from clframe.report.comparison import Group, mismatch
from clframe.report.labels import differing_keys, full_labels, listed_labels
from clframe.tables import Cell, Table


def choose_base(groups: Sequence[Group]) -> Group:
    """Return the group with which most others are comparable, the first one of several."""
    most, chosen = -1, groups[0]
    for group in groups:
        count = sum(not mismatch(group, other) for other in groups if other is not group)
        if count == len(groups) - 1:
            return group
        if count > most:
            most, chosen = count, group
    return chosen


def notices_of(groups: Sequence[Group], base: Group) -> list[str]:
    """List in one notice each which groups lack seeds of others, and which are not comparable with ``base``."""
    every = {seed for group in groups for seed in group.seeds}
    missing: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for group in groups:
        lacking = sorted(every.difference(group.seeds))
        if lacking:
            missing.setdefault(", ".join(map(str, lacking)), []).append(group.label)
        why = mismatch(base, group) if group is not base else ""
        if why:
            reasons.setdefault(why, []).append(group.label)
    notices = []
    if missing:
        lacks = "; ".join(f"{listed_labels(labels)} without seed {seeds}" for seeds, labels in missing.items())
        notices.append(f"Groups have different seeds: {lacks}. Differences are over common seeds only.")
    if reasons:
        which = "; ".join(f"{listed_labels(labels)} ({why})" for why, labels in reasons.items())
        none = sum(map(len, reasons.values())) == len(groups) - 1
        notices.append(
            f"{'No group is' if none else 'Some groups are not'} comparable with '{base.label}': {which}. No "
            f"difference from {'it' if none else 'them'} is shown."
        )
    return notices


def settings_table(groups: Sequence[Group]) -> Table | None:
    """Make one row for each value of a setting that differs, with its groups; None if the names of groups have all."""
    settings = [group.runs[0].settings for group in groups]
    if [group.label for group in groups] == full_labels(settings, written=[group.runs[0].strategy for group in groups]):
        return None
    rows: list[tuple[Cell, ...]] = []
    for key in differing_keys(settings):
        values: dict[str, list[str]] = {}
        for group, flat in zip(groups, settings, strict=True):
            if key in flat:
                values.setdefault(flat[key], []).append(group.label)
        rows += [(key, value, "; ".join(labels)) for value, labels in values.items()]
    return Table(
        name="settings", title="Settings that differ", columns=("setting", "value", "groups"), rows=tuple(rows),
        note="Names of groups leave out the values that most groups have.",
    )  # fmt: skip
