"""Selection: hyper-parameters are compared on validation data, and test seeds run with the best ones only.

Runs of a selection are those of the sweep with ``benchmark.evaluate=validation``, the candidate's values and the
selection's seeds; their accuracies are those on the data that ``benchmark.validation`` holds out. The candidate with
the best mean over its seeds is chosen, for each combination of the other values; of equal ones the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from clframe.errors import ClframeError, ConfigError
from clframe.files import write_atomically
from clframe.metrics.registry import METRICS
from clframe.metrics.statistics import mean
from clframe.results import Result
from clframe.sweep.cells import Cell, read_attempts
from clframe.sweep.plan import Checked, check_axes, check_settings, record_cells
from clframe.sweep.space import Candidate, Range, Selection, Setting, Space, combinations, label_of

CHOSEN: Final = "selection.json"
"""File of a sweep with the candidates and their validation metrics."""
VALIDATION: Final[Setting] = {"benchmark.evaluate": "validation"}

Train = Callable[[Sequence[Cell]], Mapping[str, str]]
"""Trains cells; returns the reason of each that has failed, by key."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best candidate for one combination of the other values."""

    base: Setting
    best: Candidate
    candidates: tuple[Candidate, ...]


def select(sweep: Path, space: Space, train: Train, *, jobs: int = 1) -> list[Choice]:
    """Run the selection of a sweep, and write its candidates to ``selection.json``.

    Args:
        sweep: Folder of the sweep.
        space: Its values, with a selection.
        train: Trains cells.
        jobs: Candidates that a sampler draws before the first of them is finished.

    Raises:
        ClframeError: No validation data, a config that is refused, a cell that failed, or only diverged candidates.
    """
    chosen = space.select
    assert chosen is not None
    bases = space.settings()
    _check_validation(space, bases)
    if chosen.sampler == "optuna":
        from clframe.sweep.optuna_sampler import sample

        check_settings(space.config, [{**base, **_first(chosen), **VALIDATION} for base in bases])
        candidates = [sample(sweep, base, chosen, partial(_evaluate, sweep, space, train, base), jobs=jobs)
                      for base in bases]  # fmt: skip
    else:
        candidates = _evaluate_grid(sweep, space, train, bases)
    choices = [_choose(base, found, chosen) for base, found in zip(bases, candidates, strict=True)]
    write_atomically(sweep / CHOSEN, json.dumps(_content(chosen, choices), indent=1) + "\n")
    return choices


def _first(chosen: Selection) -> Setting:
    """The first candidate, with which configs are checked before a sampler draws others."""
    return {key: str(values.low) if isinstance(values, Range) else values[0] for key, values in chosen.over.items()}


def _check_validation(space: Space, bases: Sequence[Setting]) -> None:
    for one in check_settings(space.config, bases):
        if not one.config.benchmark.validation:
            raise ConfigError(
                "select: found benchmark.validation 0.0, which leaves only test data to choose by; hold data out, such "
                "as benchmark.validation=0.1"
            )
        if one.config.benchmark.evaluate != "test":
            raise ConfigError(
                "benchmark.evaluate: found validation, which would never show test data; leave it out, the selection "
                "sets it for its own runs"
            )


def _evaluate(
    sweep: Path, space: Space, train: Train, base: Setting, drawn: Sequence[Setting]
) -> list[Candidate]:  # fmt: skip
    """Train the runs of candidates for one combination of the other values; returns each with its metric."""
    checked = check_settings(space.config, [{**base, **values, **VALIDATION} for values in drawn])
    return _measure_all(space, drawn, checked, _train(sweep, space, train, checked))


def _evaluate_grid(sweep: Path, space: Space, train: Train, bases: Sequence[Setting]) -> list[list[Candidate]]:
    """Train the runs of all candidates of all combinations together, so that processes do not idle between them."""
    assert space.select is not None
    drawn = list(combinations({key: v for key, v in space.select.over.items() if not isinstance(v, Range)}))
    settings = [{**base, **values, **VALIDATION} for base in bases for values in drawn]
    checked = check_settings(space.config, settings)
    check_axes(checked)
    cells, count = _train(sweep, space, train, checked), len(drawn)
    return [_measure_all(space, drawn, checked[i * count : (i + 1) * count], cells) for i in range(len(bases))]


def _measure_all(
    space: Space, drawn: Sequence[Setting], checked: Sequence[Checked], cells: Mapping[str, Sequence[Cell]]
) -> list[Candidate]:
    assert space.select is not None
    found = []
    for values, one in zip(drawn, checked, strict=True):
        value, reason = _measure(cells[one.digest], space.select.metric)
        setting = {key: text for key, text in one.setting.items() if key not in VALIDATION}
        found.append(Candidate(setting=setting, chosen=values, value=value, reason=reason))
    return found


def _train(sweep: Path, space: Space, train: Train, checked: Sequence[Checked]) -> dict[str, list[Cell]]:
    """Train the runs of candidates; returns them by the digest of their config.

    Raises:
        ClframeError: One failed for another reason than values with which it diverges.
    """
    chosen = space.select
    assert chosen is not None
    keys = [*space.varied(), *chosen.over]
    cells = record_cells(sweep, checked, seeds=chosen.seeds, keys=keys, stage="selection")
    failed = train(cells)
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if failed.get(cell.key) and not read_attempts(sweep, cell.key).diverged:
            raise ClframeError(
                f"select: {cell.label}, seed {cell.seed} failed ({failed[cell.key]}) and nothing was chosen; call "
                f"again with --retry, or leave its values out"
            )
        found.setdefault(cell.key.partition("-")[0], []).append(cell)
    return found


def _measure(cells: Sequence[Cell], metric: str) -> tuple[float, str]:
    """Return the mean over seeds on validation data, and the reason where there is none."""
    values = []
    for cell in cells:
        if not cell.finished():
            return math.nan, f"seed {cell.seed} diverged"
        score = Result.from_json(cell.results).score(metric)
        if math.isnan(score.value):
            return math.nan, f"seed {cell.seed}: {score.undefined}"
        values.append(score.value)
    return mean(values), ""


def _choose(base: Setting, candidates: Sequence[Candidate], chosen: Selection) -> Choice:
    usable = [candidate for candidate in candidates if not math.isnan(candidate.value)]
    if not usable:
        where = label_of(base, list(base)) or "the config"
        reason = candidates[0].reason if candidates else "there are none"
        raise ClframeError(f"select: no candidate of {where} has a number ({reason}); give other values")
    pick = min if METRICS.get(chosen.metric).better == "lower" else max
    return Choice(base=base, best=pick(usable, key=lambda found: found.value), candidates=tuple(candidates))


def test_cells(sweep: Path, space: Space, choices: Sequence[Choice]) -> list[Cell]:
    """Return the cells of the test seeds with the chosen values."""
    assert space.select is not None
    checked = check_settings(space.config, [choice.best.setting for choice in choices])
    return record_cells(sweep, checked, seeds=space.seeds, keys=[*space.varied(), *space.select.over])


def _content(chosen: Selection, choices: Sequence[Choice]) -> dict[str, object]:
    return {
        "metric": chosen.metric, "data": "validation", "seeds": list(chosen.seeds),
        "choices": [
            {"setting": choice.base, "chosen": choice.best.chosen, "value": choice.best.value, "candidates": [
                {"values": c.chosen, "value": None if math.isnan(c.value) else c.value, "reason": c.reason}
                for c in choice.candidates
            ]}
            for choice in choices
        ],
    }  # fmt: skip
