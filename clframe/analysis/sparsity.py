"""How much of a model's activations can be zeroed: achieved and critical sparsity by role and layer.

The model is not trained and not changed. One rule with one value masks every layer at once, token by token; the sweep
over values gives a curve, and the critical sparsity is the highest that keeps 99 % of the dense score. What a dense
Gaussian vector would lose by the same rule stands beside it: only the excess over that is a property of the model.
Szatkowski et al., "Universal Properties of Activation Sparsity in Modern Large Language Models" (2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clframe.analysis.masks import Masking, Seen
from clframe.analysis.places import ROLES, Inputs, Place, answering, called, changing, places_of
from clframe.errors import ConfigError
from clframe.functional.sparsity import MaskKind, critical_point, critical_sparsity
from clframe.functional.sparsity_baselines import baseline_sparsity

Batches = Iterable[tuple[Inputs, Any, Tensor | Mapping[str, Tensor] | None]]
"""(inputs, targets, mask): the mask says which tokens count; several by name, such as prompt and generated, apart."""

SWEEP: tuple[float, ...] = tuple(1 - at / 25 for at in range(26))
"""26 shares from 1.00 to 0."""

ALL = "all inputs"


class Score(Protocol):
    """One number for each sample or token, higher is better, whose mean is the model's score."""

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """Of one batch."""



@dataclass(frozen=True)
class Curve:
    """A sweep of one rule over one role, or over input and intermediate together (``all inputs``).

    Attributes:
        role: Where masks were applied.
        kind: The rule.
        values: p, the share of neurons kept (top-k) or the threshold.
        scores: Of the masked model.
        achieved: Mean sparsity over places, of the tokens that count.
        layers: The same of each place: ``layer`` or, of all inputs, ``layer/role``.
        parts: The same of each named mask.
        gaussian: Sparsity of Gaussian vectors under the same rule, mean over places.
        critical: The highest sparsity that keeps the share of the dense score.
        critical_gaussian: The Gaussian's at the same value.
        critical_layers: Each place's at the same value.
    """

    role: str
    kind: MaskKind
    values: tuple[float, ...]
    scores: tuple[float, ...]
    achieved: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]
    parts: Mapping[str, tuple[float, ...]]
    gaussian: tuple[float, ...]
    critical: float
    critical_gaussian: float
    critical_layers: Mapping[str, float]

    @property
    def excess(self) -> float:
        """Critical sparsity beyond the Gaussian's."""
        return self.critical - self.critical_gaussian


@dataclass(frozen=True)
class Report:
    """What :func:`analyse` found: the dense score, the curves, the effective rank of each place by role and layer."""

    dense: float
    curves: tuple[Curve, ...]
    ranks: Mapping[str, Mapping[str, float]]


def accuracy(output: Any, targets: Tensor) -> Tensor:
    """1 where the largest logit of the last axis is the target's, else 0, for outputs that are or have logits."""
    logits = getattr(output, "last", getattr(output, "logits", output))
    right: Tensor = logits.argmax(-1) == targets
    return right.float()


def analyse(
    model: nn.Module,
    batches: Batches,
    *,
    score: Score = accuracy,
    kinds: Sequence[MaskKind] = ("top_p",),
    sweep: Mapping[str, Sequence[float]] | None = None,
    roles: Sequence[str] = (*ROLES, ALL),
    share: float = 0.99,
    rank_tokens: int = 1024,
) -> Report:
    """Measure where a model's activations are sparse and how much sparser they may become.

    Costs a pass over the batches for every value of every rule and role.

    Args:
        model: Any module with feed-forward networks, or with activations.
        batches: What it is scored on; gone through many times, so not an iterator.
        score: See :class:`Score`.
        kinds: Rules; see :func:`~clframe.functional.sparsity.keep`.
        sweep: Values of a rule; 26 by default: shares from 1 to 0 (p of top-p, neurons kept of top-k), from 0 to 1
            (max-p), or quantiles of the magnitudes found (threshold).
        roles: Which of the five.
        share: Of the dense score that critical sparsity keeps.
        rank_tokens: Tokens of each place that its effective rank is computed on.

    Raises:
        UnsupportedError: A model with neither.
        ConfigError: No batches, a mask that does not fit, or a dense score that is not above 0.
    """
    places, given = places_of(model), list(batches)
    if not given:
        raise ConfigError("sparsity.batches: found none; give at least one")
    seen = [Seen(place, limit=rank_tokens) for place in places]
    with answering(model):
        dense = _pass(model, given, score, [(one.place, one) for one in seen])
    by_role = {role: [one for one in seen if _belongs(one.place, role) and one.tokens] for role in roles}
    curves = [
        _sweep(
            model, given, score, there, role=role, kind=kind, values=(sweep or {}).get(kind), dense=dense, share=share
        )
        for role, there in by_role.items()
        for kind in kinds
        if there
    ]
    ranks = {role: {one.place.layer: one.rank for one in there} for role, there in by_role.items() if role != ALL}
    return Report(dense, tuple(curves), {role: found for role, found in ranks.items() if found})


@dataclass
class _Points:
    scores: list[float] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    gaussian: list[float] = field(default_factory=list)


def _sweep(
    model: nn.Module,
    batches: Sequence[tuple[Inputs, Any, Any]],
    score: Score,
    there: Sequence[Seen],
    *,
    role: str,
    kind: MaskKind,
    values: Sequence[float] | None,
    dense: float,
    share: float,
) -> Curve:
    values = tuple(_default_values(kind, there) if values is None else values)
    points = _Points()
    for value in values:
        masks = [Masking(one.place, kind=kind, value=value) for one in there]
        with answering(model):
            points.scores.append(_pass(model, batches, score, [(mask.place, mask) for mask in masks]))
        for mask in masks:
            points.layers.setdefault(_label(mask.place, role), []).append(mask.sparsity())
        for part in masks[0].parts:
            points.parts.setdefault(part, []).append(_mean([mask.sparsity(part) for mask in masks]))
        points.gaussian.append(_mean([_baseline(one, kind=kind, value=value) for one in there]))
    achieved = [_mean(found) for found in zip(*points.layers.values(), strict=True)]
    i, j, way = critical_point(achieved, points.scores, dense=dense, share=share)
    return Curve(
        role, kind, values, tuple(points.scores), tuple(achieved), _tuples(points.layers), _tuples(points.parts),
        tuple(points.gaussian), critical_sparsity(achieved, points.scores, dense=dense, share=share),
        _between(points.gaussian, i, j, way), {name: _between(s, i, j, way) for name, s in points.layers.items()},
    )  # fmt: skip


def _pass(
    model: nn.Module, batches: Sequence[tuple[Inputs, Any, Any]], score: Score, changes: Sequence[tuple[Place, Any]]
) -> float:
    """The score over all batches while ``changes`` act."""
    found: list[Tensor] = []
    with changing(changes):
        for inputs, targets, mask in batches:
            masks = mask if isinstance(mask, Mapping) else {"all": mask}
            for _, change in changes:
                change.masks = masks
            found.append(score(called(model, inputs), targets).flatten().double())
    values = torch.cat(found)
    if not len(values):
        raise ConfigError("sparsity.batches: found no samples; give at least one")
    return float(values.mean())


def _default_values(kind: MaskKind, there: Sequence[Seen]) -> Sequence[float]:
    if kind == "threshold":
        sizes = torch.cat([one.rows.abs().flatten() for one in there]).sort().values
        return [float(sizes[round((1 - at) * (len(sizes) - 1))]) for at in SWEEP]
    return [1 - at for at in SWEEP] if kind == "max_p" else SWEEP


def _baseline(one: Seen, *, kind: MaskKind, value: float) -> float:
    value = round(value * one.neurons) if kind == "top_k" else value
    return baseline_sparsity(value, kind=kind, neurons=one.neurons, scale=one.scale)


def _belongs(place: Place, role: str) -> bool:
    return place.role in ("input", "intermediate") if role == ALL else place.role == role


def _label(place: Place, role: str) -> str:
    return f"{place.layer}/{place.role}" if role == ALL else place.layer


def _between(values: Sequence[float], i: int, j: int, way: float) -> float:
    return values[i] + way * (values[j] - values[i])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tuples(lists: Mapping[str, Sequence[float]]) -> Mapping[str, tuple[float, ...]]:
    return {name: tuple(values) for name, values in lists.items()}
