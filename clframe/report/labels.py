"""Names of groups of runs by the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

INLINE: Final = {"exits.control": "none", "exits.gradient": "through"}
"""Options that make exits a control or probes, with their defaults."""
LONGEST: Final = 60
"""Characters of a name beyond which all names leave out the settings that most groups share."""
MOST_SETTINGS, LONGEST_VALUE = 3, 24
"""Settings in a shortened name, and characters of a value in it."""
MOST_NAMED: Final = 8
"""Groups that an error or a notice lists."""


def labels_of(settings: Sequence[Mapping[str, str]], *, written: Sequence[str] = ()) -> list[str]:
    """Name each group by what differs: the strategy, then other keys, then the experiment's name.

    A key differs where two groups have it with different values. Options that make exits probes or a control are
    written into the strategy. If a name is longer than :data:`LONGEST`, each has the first :data:`MOST_SETTINGS` of the
    settings that differ from those of most groups.

    Args:
        settings: Flat config of each group.
        written: Strategy of each group in the order in which it was written; empty for that of the config.

    >>> labels_of([{"strategy": "er", "er.memory": "50"}, {"strategy": "er", "er.memory": "200"}])
    ['er.memory=50', 'er.memory=200']
    >>> labels_of([{"strategy": "er", "er.memory": "50"}, {"strategy": "naive"}])
    ['er', 'naive']
    """
    labels = full_labels(settings, written=written)
    if max(map(len, labels), default=0) <= LONGEST:
        return labels
    common = _most_common(settings)
    chosen = [{key: flat[key] for key in common if key in flat and flat[key] != common[key]} for flat in settings]
    names = _strategies(settings, written)
    whole = [_name(name, found) for name, found in zip(names, chosen, strict=True)]
    short = [_cut(name, found) for name, found in zip(names, chosen, strict=True)]
    labels = [cut if short.count(cut) == 1 else uncut for cut, uncut in zip(short, whole, strict=True)]
    return _apart(labels, settings)


def full_labels(settings: Sequence[Mapping[str, str]], *, written: Sequence[str] = ()) -> list[str]:
    """Name each group, as :func:`labels_of`, by all settings that differ."""
    differing, names = differing_keys(settings), _strategies(settings, written)
    differs = len({flat["strategy"] for flat in settings}) > 1 or bool(_inline(settings))
    labels = [
        _name(name * differs, {key: flat[key] for key in differing if key in flat}) or name
        for name, flat in zip(names, settings, strict=True)
    ]
    return _apart(labels, settings)


def differing_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys in which two configs differ, without strategy, experiment's name and what the strategy's has."""
    keys = sorted({key for flat in settings for key in flat} - {"strategy", "name", *_inline(settings)})
    return [key for key in keys if len({flat[key] for flat in settings if key in flat}) > 1]


def listed_labels(labels: Sequence[str]) -> str:
    """Return the first names, quoted.

    >>> listed_labels(["er", "lwf"])
    "'er', 'lwf'"
    """
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return ", ".join(f"'{label}'" for label in labels[:MOST_NAMED]) + more


def _inline(settings: Sequence[Mapping[str, str]]) -> list[str]:
    return [key for key in INLINE if len({flat[key] for flat in settings if key in flat}) > 1]


def _most_common(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the most frequent value of each key that differs, the first one of several."""
    return {
        key: Counter(flat[key] for flat in settings if key in flat).most_common(1)[0][0]
        for key in differing_keys(settings)
    }


def _strategies(settings: Sequence[Mapping[str, str]], written: Sequence[str]) -> list[str]:
    """Write options of exits that are not at their default into the strategy of each group."""
    inline, names = _inline(settings), []
    for strategy, flat in zip(written or [flat["strategy"] for flat in settings], settings, strict=True):
        terms = []
        for name in strategy.split(" + "):
            options = [
                f"{key.removeprefix(f'{name}.')}={flat[key]}"
                for key in inline if key.startswith(f"{name}.") and flat.get(key, INLINE[key]) != INLINE[key]
            ]  # fmt: skip
            terms.append(f"{name}({', '.join(options)})" if options else name)
        names.append(" + ".join(terms))
    return names


def _name(strategy: str, found: Mapping[str, str]) -> str:
    return ", ".join([*filter(None, [strategy]), *(f"{_short(key)}={value}" for key, value in found.items())])


def _cut(strategy: str, found: Mapping[str, str]) -> str:
    few = {
        key: value if len(value) <= LONGEST_VALUE else f"{value[: LONGEST_VALUE - 3]}..."
        for key, value in list(found.items())[:MOST_SETTINGS]
    }
    more = len(found) - len(few)
    return _name(strategy, few) + (f", {more} more" if more else "")


def _short(key: str) -> str:
    """Return a key without its block where the rest says enough.

    >>> _short("trainer.epochs"), _short("backbone.name"), _short("er.memory")
    ('epochs', 'backbone', 'er.memory')
    """
    if key.endswith(".name"):
        return key.removesuffix(".name")
    return key.removeprefix("trainer.").removeprefix("benchmark.").removeprefix("optimizer.")


def _apart(labels: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Put the experiment's name in front where names are equal, and number those that still are."""
    if len(set(labels)) < len(labels):
        labels = [f"{flat.get('name', 'run')}: {label}" for label, flat in zip(labels, settings, strict=True)]
    return [label if labels.count(label) == 1 else f"{label} ({n + 1})" for n, label in enumerate(labels)]
