"""Sweeps of masks over a model: achieved and critical sparsity by role and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.frozen import call_model, evaluating
from clframe.nn.types import Inputs
from clframe.sparsity.functional import MaskKind, baseline_sparsity, critical_point
from clframe.sparsity.masking import (
    ATTENTION_ROLES,
    ROLES,
    HookPoint,
    Masker,
    Recorder,
    find_attention_points,
    find_hook_points,
    replacing,
    require_weights,
)


@dataclass(frozen=True)
class SparsityCurve:
    """A sweep of one rule over one role, or over input and intermediate together (``all inputs``).

    Attributes:
        role: Where masks were applied.
        kind: The rule.
        values: p, the share of neurons kept (top-k) or the threshold.
        scores: Score of the masked model.
        achieved: Mean sparsity over hook points, of the unmasked tokens.
        layers: The same at each hook point: ``layer`` or, of all inputs, ``layer/role``.
        parts: The same under each named token mask.
        gaussian: Sparsity of Gaussian vectors under the same rule, mean over hook points.
        gaussian_layers: The same at each hook point.
        critical: The highest sparsity that keeps the share of the dense score.
        critical_value: The rule's value at the critical sparsity.
        critical_gaussian: Sparsity of Gaussian vectors at that value.
        critical_layers: Sparsity at each hook point at that value.
        critical_gaussian_layers: Sparsity of Gaussian vectors at each hook point at that value.
        critical_parts: Sparsity under each token mask at that value.
    """

    role: str
    kind: MaskKind
    values: tuple[float, ...]
    scores: tuple[float, ...]
    achieved: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]
    parts: Mapping[str, tuple[float, ...]]
    gaussian: tuple[float, ...]
    gaussian_layers: Mapping[str, tuple[float, ...]]
    critical: float
    critical_value: float
    critical_gaussian: float
    critical_layers: Mapping[str, float]
    critical_gaussian_layers: Mapping[str, float]
    critical_parts: Mapping[str, float]

    @property
    def excess(self) -> float:
        """Critical sparsity minus the Gaussian's."""
        return self.critical - self.critical_gaussian


@dataclass(frozen=True)
class SparsityReport:
    """Results of :func:`analyze`.

    Attributes:
        dense: Score of the unmasked model.
        curves: One per role and rule.
        ranks: Effective rank at each hook point by role and layer.
    """

    dense: float
    curves: tuple[SparsityCurve, ...]
    ranks: Mapping[str, Mapping[str, float]]


Batches = Iterable[tuple[Inputs, Any, Tensor | Mapping[str, Tensor] | None]]
"""(inputs, targets, mask): the mask selects tokens; several masks by name, such as prompt and generated."""

SWEEP: tuple[float, ...] = tuple(1 - at / 25 for at in range(26))
"""26 shares from 1.00 to 0."""

ALL = "all inputs"


class Score(Protocol):
    """One number for each sample or token, higher is better, whose mean is the model's score."""

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """Score one batch."""


def accuracy(output: Any, targets: Tensor) -> Tensor:
    """Return 1 where the largest logit of the last axis is the target's, else 0; outputs are or have logits."""
    logits = getattr(output, "last", getattr(output, "logits", output))
    right: Tensor = logits.argmax(-1) == targets
    return right.float()


def analyze(
    model: nn.Module,
    batches: Batches,
    *,
    score: Score = accuracy,
    kinds: Sequence[MaskKind] = ("top_p",),
    power: float = 1.0,
    sweep: Mapping[str, Sequence[float]] | None = None,
    roles: Sequence[str] = (*ROLES, ALL),
    share: float = 0.99,
    rank_tokens: int = 1024,
    inside: nn.Module | None = None,
    predict: Callable[[nn.Module, Inputs], Any] = call_model,
    evaluate: Callable[[nn.Module, Inputs, Any], Tensor] | None = None,
    least: Callable[[float], float] | None = None,
    on_pass: Callable[[int, int], None] | None = None,
) -> SparsityReport:
    """Measure where a model's activations are sparse and how much sparser they may become.

    Makes one pass over the batches for every value of every rule and role.

    Args:
        model: Any module with feed-forward networks, or with activations.
        batches: Data to score on; a sequence is iterated many times and may create its items lazily.
        score: See :class:`Score`.
        kinds: Rules; see :func:`~clframe.sparsity.functional.keep`.
        power: Of magnitudes in top-p: 1 for shares of the sum, 2 for shares of the sum of squares.
        sweep: Values of a rule; 26 by default: shares from 1 to 0 (p of top-p, neurons kept of top-k), from 0 to 1
            (max-p), or quantiles of the magnitudes found (threshold).
        roles: Some of the five roles of feed-forward networks, and of ``attention`` and ``heads``, the inputs of
            attentions and the outputs of their heads, which are measured on request only.
        share: Share of the dense score to keep at the critical sparsity.
        rank_tokens: Tokens of each hook point for its effective rank.
        inside: Submodule to search for hook points; names are relative to it. None searches the model.
        predict: Maps the model and the inputs of a batch to the output that is scored.
        evaluate: Maps the model, inputs and targets of a batch to the values whose mean is the score; None is ``score``
            of ``predict``.
        least: Maps the dense score to the lowest one at the critical sparsity; None is ``share`` times it.
        on_pass: Called with the finished and the total number of passes, after each pass over the batches.

    Raises:
        UnsupportedError: A model without either, with none of the roles, or on the meta device.
        ConfigError: No batches, a mask that does not fit, a dense score that is not above 0, or a power that is not
            above 0 or has no effect.
    """
    require_weights(model)
    if not 0 < power < inf:
        raise ConfigError(f"sparsity.power: found {power}; give a number above 0")
    if power != 1 and "top_p" not in kinds:
        raise ConfigError(f"sparsity.power: found {power} for {', '.join(kinds)}; use it with top_p, or leave it out")
    body = model if inside is None else inside
    points = find_hook_points(body)
    if set(roles) & set(ATTENTION_ROLES):
        points = (*points, *find_attention_points(body))
    if evaluate is None:

        def evaluate(model: nn.Module, inputs: Inputs, targets: Any) -> Tensor:
            return score(predict(model, inputs), targets)

    scorer = _Scorer(model, batches if isinstance(batches, Sequence) else list(batches), evaluate, on_pass)
    if not scorer.batches:
        raise ConfigError("sparsity.batches: found none; give at least one")
    seen = [Recorder(point, limit=rank_tokens) for point in points]
    dense = scorer.score_with([(one.point, one) for one in seen])
    lowest = None if least is None else least(dense)
    by_role = {role: [one for one in seen if _belongs(one.point, role) and one.tokens] for role in roles}
    if not any(by_role.values()):
        if not any(one.tokens for one in seen):
            raise UnsupportedError(
                f"sparsity: found no feed-forward network in {type(model).__name__}, and its activations do not run as "
                f"modules; give a transformer or another model with one"
            )
        raise UnsupportedError(
            f"sparsity.roles: found {', '.join(roles) or 'none'}, of which the model has none; use "
            f"{', '.join(dict.fromkeys(one.point.role for one in seen if one.tokens))}"
        )
    chosen = [
        (role, kind, there, tuple((sweep or {}).get(kind) or _default_values(kind, there)))
        for role, there in by_role.items()
        for kind in kinds
        if there
    ]
    scorer.expect(sum(len(values) for *_, values in chosen))
    curves = [
        _sweep(scorer, there, role=role, kind=kind, values=values, power=power, dense=dense, share=share, least=lowest)
        for role, kind, there, values in chosen
    ]
    ranks = {role: {one.point.layer: one.rank for one in there} for role, there in by_role.items() if role != ALL}
    return SparsityReport(dense, tuple(curves), {role: found for role, found in ranks.items() if found})


class _Scorer:
    """Passes of one model over the same batches, with a count of passes."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Inputs, Any, Any]],
        evaluate: Callable[[nn.Module, Inputs, Any], Tensor],
        on_pass: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.batches, self.evaluate, self.on_pass = model, batches, evaluate, on_pass
        self.done, self.all = 0, 1

    def expect(self, passes: int) -> None:
        """Increase the total number of passes."""
        self.all += passes

    def score_with(self, changes: Sequence[tuple[HookPoint, Any]]) -> float:
        """Compute the score over all batches while ``changes`` are active."""
        found: list[Tensor] = []
        with evaluating(self.model), replacing(changes):
            for inputs, targets, mask in self.batches:
                masks = mask if isinstance(mask, Mapping) else {"all": mask}
                for _, change in changes:
                    change.masks = masks
                found.append(self.evaluate(self.model, inputs, targets).flatten().double())
        values = torch.cat(found)
        if not len(values):
            raise ConfigError("sparsity.batches: found no samples; give at least one")
        self.done += 1
        if self.on_pass is not None:
            self.on_pass(self.done, self.all)
        return float(values.mean())


@dataclass
class _Points:
    scores: list[float] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    gaussian: dict[str, list[float]] = field(default_factory=dict)


def _sweep(
    scorer: _Scorer,
    there: Sequence[Recorder],
    *,
    role: str,
    kind: MaskKind,
    values: tuple[float, ...],
    power: float,
    dense: float,
    share: float,
    least: float | None,
) -> SparsityCurve:
    points = _Points()
    for value in values:
        masks = [Masker(one.point, kind=kind, value=value, power=power) for one in there]
        points.scores.append(scorer.score_with([(mask.point, mask) for mask in masks]))
        for mask, one in zip(masks, there, strict=True):
            label = _label(mask.point, role)
            points.layers.setdefault(label, []).append(mask.sparsity())
            points.gaussian.setdefault(label, []).append(_baseline(one, kind=kind, value=value, power=power))
        for part in masks[0].parts:
            points.parts.setdefault(part, []).append(_mean([mask.sparsity(part) for mask in masks]))
    achieved = [_mean(found) for found in zip(*points.layers.values(), strict=True)]
    gaussian = [_mean(found) for found in zip(*points.gaussian.values(), strict=True)]
    i, j, way = critical_point(achieved, points.scores, dense=dense, share=share, least=least)

    def there_of(curves: Mapping[str, Sequence[float]]) -> Mapping[str, float]:
        return {name: _between(curve, i, j, way) for name, curve in curves.items()}

    return SparsityCurve(
        role=role, kind=kind, values=values, scores=tuple(points.scores), achieved=tuple(achieved),
        layers=_tuples(points.layers), parts=_tuples(points.parts),
        gaussian=tuple(gaussian), gaussian_layers=_tuples(points.gaussian),
        critical=_between(achieved, i, j, way), critical_value=_between(values, i, j, way),
        critical_gaussian=_between(gaussian, i, j, way), critical_layers=there_of(points.layers),
        critical_gaussian_layers=there_of(points.gaussian), critical_parts=there_of(points.parts),
    )  # fmt: skip


def _default_values(kind: MaskKind, there: Sequence[Recorder]) -> Sequence[float]:
    if kind == "threshold":
        sizes = torch.cat([one.rows.abs().flatten() for one in there]).sort().values
        return [float(sizes[round((1 - at) * (len(sizes) - 1))]) for at in SWEEP]
    return [1 - at for at in SWEEP] if kind == "max_p" else SWEEP


def _baseline(one: Recorder, *, kind: MaskKind, value: float, power: float) -> float:
    value = round(value * one.neurons) if kind == "top_k" else value
    return baseline_sparsity(value, kind=kind, neurons=one.neurons, power=power, scale=one.scale)


def _belongs(point: HookPoint, role: str) -> bool:
    return point.role in ("input", "intermediate") if role == ALL else point.role == role


def _label(point: HookPoint, role: str) -> str:
    return f"{point.layer}/{point.role}" if role == ALL else point.layer


def _between(values: Sequence[float], i: int, j: int, way: float) -> float:
    return values[i] + way * (values[j] - values[i])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tuples(lists: Mapping[str, Sequence[float]]) -> Mapping[str, tuple[float, ...]]:
    return {name: tuple(values) for name, values in lists.items()}
