"""Families of groups: a strategy alone, with exits, with detached probes, and with a control of equal size."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from clframe.core import parse
from clframe.core.expression import split_terms
from clframe.errors import ClframeError, nearest
from clframe.report.comparison import Group, mismatch
from clframe.report.labels import listed_labels
from clframe.report.loading import flatten

BASE: Final = "base"
EXITS: Final = "with exits"
PROBES: Final = "detached probes"
CONTROL: Final = "control of equal size"
KINDS: Final = (BASE, EXITS, PROBES, CONTROL)
"""Kinds of groups in the order of a table."""

ON_EXITS: Final = ("exits", "early_exit")
"""Components that a strategy with exits has in addition to its base."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A group with its kind and the group that it is compared with."""

    group: Group
    kind: str
    base: Group | None
    """The same strategy without exits, or the reference chosen; None where there is none."""


def kind_of(settings: Mapping[str, str]) -> str:
    """Return the kind of runs with this flat config.

    >>> kind_of({"strategy": "er"}), kind_of({"strategy": "er + exits", "exits.gradient": "detached"})
    ('base', 'detached probes')
    """
    if "exits" not in names_of(settings):
        return BASE
    if settings.get("exits.control", "none") != "none":
        return CONTROL
    return PROBES if settings.get("exits.gradient") == "detached" else EXITS


def names_of(settings: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the strategy's components."""
    return tuple(settings["strategy"].split(" + "))


def members(groups: Sequence[Group], *, reference: Group | None = None) -> list[Member]:
    """Order groups by family, and in each family by kind.

    Args:
        groups: In the order of the report, which is the order of the families.
        reference: The group that every other one is compared with; None compares each with the base of its family.
    """
    families: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups:
        families.setdefault(_family(group.runs[0].settings), []).append(group)
    found = []
    for family in families.values():
        bases = [group for group in family if kind_of(group.runs[0].settings) == BASE]
        for group in sorted(family, key=lambda group: KINDS.index(kind_of(group.runs[0].settings))):
            kind = kind_of(group.runs[0].settings)
            comparable = next((base for base in bases if not mismatch(base, group)), bases[0] if bases else None)
            own = None if kind == BASE else comparable
            found.append(Member(group=group, kind=kind, base=own if reference is None else reference))
    return found


def _family(settings: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return what members of a family share: everything but exits, the experiment's name and the benchmark.

    Settings of the benchmark are left out because :func:`~clframe.report.comparison.mismatch` names their differences.
    """
    names = [name for name in names_of(settings) if name not in ON_EXITS and name != "naive"]
    left_out = ("name", "strategy")
    prefixes = ("benchmark.", *(f"{name}." for name in ON_EXITS))
    rest = {key: value for key, value in settings.items() if key not in left_out and not key.startswith(prefixes)}
    return tuple(sorted({**rest, "strategy": " + ".join(names)}.items()))


def choose_reference(groups: Sequence[Group], against: str) -> Group:
    """Return the group that ``against`` names: by its label, else by its strategy, in any order of the components.

    Options in ``against`` have to be those of the group; options that it leaves out may have any value.

    Raises:
        ClframeError: No group or several groups of this name, or a single group, which has none to compare with.
    """
    labels = [group.label for group in groups] or ["none is finished"]
    if len(groups) < 2:
        raise ClframeError(
            f"report: --against: found '{against}' with one group, '{labels[0]}'; give runs of another group too"
        )
    exact = [group for group in groups if group.label == against]
    exact = exact or [group for group in groups if _in_order(group.label) == _in_order(against)]
    found = exact or [group for group in groups if _fits(group.runs[0].settings, against)]
    if len(found) == 1:
        return found[0]
    if not found:
        close = nearest(against, labels)
        advice = f"did you mean '{close}'?" if close else f"give one of {listed_labels(labels)}"
        raise ClframeError(f"report: --against: found '{against}', which is not a group; {advice}")
    raise ClframeError(
        f"report: --against: found '{against}', which fits several groups; give one of "
        f"{listed_labels([group.label for group in found])}"
    )


def _in_order(expression: str) -> list[str]:
    """Return the terms of an expression in alphabetical order, without spaces."""
    return sorted("".join(term.split()) for term in split_terms(expression))


def _fits(settings: Mapping[str, str], expression: str) -> bool:
    """Whether a flat config has the components of an expression, and the options that it gives."""
    try:
        composition = parse(expression)
    except ClframeError:
        return False
    flat = flatten({component.name: asdict(component) for component in composition})
    calls = [node for node in ast.walk(ast.parse(expression.strip(), mode="eval")) if isinstance(node, ast.Call)]
    given = [f"{ast.unparse(call.func)}.{keyword.arg}" for call in calls for keyword in call.keywords]
    return str(composition) == settings["strategy"] and all(settings.get(key) == flat.get(key) for key in given)
