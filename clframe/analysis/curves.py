"""What a sweep over masks has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clframe.functional.sparsity import MaskKind


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
        gaussian_layers: The same of each place.
        critical: The highest sparsity that keeps the share of the dense score.
        critical_value: The rule's value there.
        critical_gaussian: The Gaussian's at the same value.
        critical_layers: Each place's at the same value.
        critical_gaussian_layers: The Gaussian's of each place at the same value.
        critical_parts: Each part's at the same value.
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
        """Critical sparsity beyond the Gaussian's."""
        return self.critical - self.critical_gaussian


@dataclass(frozen=True)
class Report:
    """What :func:`~clframe.analysis.sparsity.analyse` found.

    Attributes:
        dense: Score of the model as it is.
        curves: One for each role and rule.
        ranks: Effective rank of each place by role and layer.
    """

    dense: float
    curves: tuple[Curve, ...]
    ranks: Mapping[str, Mapping[str, float]]
