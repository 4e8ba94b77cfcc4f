"""RanPAC: ridge regression on random features of a frozen network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import (
    exact,
    for_met_classes,
    held_out_errors,
    random_features,
    ridge_regression,
    widened,
)
from clframe.nn.features import embedded, exit_features
from clframe.nn.network import Network
from clframe.nn.types import Output


@dataclass(frozen=True, kw_only=True)
class RanPAC(Component):
    """RanPAC: random features of a frozen network and a ridge regression over all data so far, no gradients.

    Every exit answers ``h' (G + r I)^-1 Q`` with ``h = relu(f' W)``, f its embedded tap (a map's mean, the first
    token), W drawn once from N(0, 1), ``G = sum h h'`` and ``Q = sum h y'`` over every sample seen, y one-hot. G and Q
    do not depend on the order of experiences, so nothing is forgotten. r is chosen in each experience by the error
    on a share of its samples that is held out of a regression on the others, then all samples count. For
    pre-trained backbones. It costs one forward pass over the data, M^2 + F M + M C numbers of 8 bytes an exit (8 MB
    for M = 1000, 800 MB for 10000), and M^3 operations an experience. It owns the slot ``batch``: no sample is
    trained on. McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning" (2023).

    Args:
        projection: M, random features: several times the width of f. 10000 as published, for ViT-B/16 and its 768.
        ridges: Values to choose r from, ascending. One value is taken as it is. 1e-8 to 1e8 as published.
        held_out: Share of an experience's samples that choose r. 0.2 as published. At most M samples take part.
        train_first: Whether the first experience trains the network, with gradients, before it is frozen.
    """

    name: ClassVar[str] = "ranpac"
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "logits"})

    projection: int = 1000
    ridges: tuple[float, ...] = tuple(10.0**power for power in range(-8, 9))
    held_out: float = 0.2
    train_first: bool = False

    def __post_init__(self) -> None:
        """Refuse features that are none and parameters that leave the system singular."""
        for key, ok, advice in (
            ("projection", self.projection >= 1, "give at least 1 feature"),
            ("ridges", self.ridges and all(ridge > 0 for ridge in self.ridges), "give numbers above 0"),
            ("held_out", 0 < self.held_out < 1, "give a share between 0 and 1"),
        ):
            if not ok:
                raise ConfigError(f"components.ranpac.{key}: found {getattr(self, key)}; {advice}")

    def taps(self, network: Network) -> Sequence[str]:
        """Every exit's own."""
        return network.exit_taps

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Nothing is trained on, but the first experience where that is wanted."""
        return (0,) if self.train_first and index == 0 else ()

    def init_state(self, network: Network) -> State:
        """No samples yet."""
        return {"taps": network.exit_taps, "count": torch.empty(0, dtype=torch.long), "exits": []}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Stream over the experience's samples in random order, choose the ridge parameter and solve."""
        samples, classes, count_C = context.experience.samples, network.classes, state["count"]
        order_N = torch.randperm(len(samples), generator=context.generator)
        exits = [{**sums, "gram": sums["gram"].clone()} for sums in state["exits"]]
        first: list[list[Tensor]] = [[] for _ in network.heads]  # up to M samples by which to choose
        seen = 0
        for features, y_B in exit_features(network, samples, order=order_N):
            exits = exits or [self._fresh(values_BF, context.generator) for values_BF in features]
            targets_BC = F.one_hot(y_B, classes)
            count_C = widened(count_C.to(y_B.device), classes) + targets_BC.sum(0)
            for sums, rows, values_BF in zip(exits, first, features, strict=True):
                h_BM = exact(random_features(values_BF, sums["projection"]))
                sums["gram"].addmm_(h_BM.T, h_BM)
                sums["cross"] = widened(sums["cross"].T, classes).T + h_BM.T @ targets_BC.to(h_BM)
                if seen < self.projection:
                    rows.append(h_BM[: self.projection - seen])
            seen += len(y_B)
        y_N = samples.y[order_N.to(samples.y.device)][: self.projection]
        for sums, rows in zip(exits, first, strict=True):
            sums["ridge"] = self._ridge(torch.cat(rows), y_N.to(rows[0].device), classes, before=sums["ridge"])
            weight_MC = ridge_regression(sums["gram"], sums["cross"], ridge=sums["ridge"])
            sums["weight"] = weight_MC.to(sums["projection"])
        return {**state, "count": count_C, "exits": exits}

    def adjust_logits(self, output: Output, state: State) -> Output:
        """Linear scores of the random features at every exit, from the end of the first experience on."""
        if not state["exits"]:
            return output
        met_C, logits = (state["count"] > 0).to(output.last.device), []
        for tap, sums in zip(state["taps"], state["exits"], strict=True):
            features_BF = embedded(output.taps[tap]).to(sums["projection"])
            scores_BC = random_features(features_BF, sums["projection"]) @ sums["weight"]
            logits.append(for_met_classes(scores_BC, met_C, classes=output.last.shape[1]))
        return output._replace(logits=tuple(logits))

    def _fresh(self, features_BF: Tensor, generator: Generator) -> dict[str, Any]:
        """An exit before its first sample; the middle of the ridges until there are samples to choose by."""
        projection_FM = torch.randn(features_BF.shape[1], self.projection, generator=generator)
        empty_MM = exact(features_BF).new_zeros(self.projection, self.projection)
        return {
            "projection": projection_FM.to(features_BF),
            "gram": empty_MM,
            "cross": empty_MM[:, :0],
            "ridge": self.ridges[len(self.ridges) // 2],
        }

    def _ridge(self, h_NM: Tensor, y_N: Tensor, classes: int, *, before: float) -> float:
        """The value with the smallest error on the first samples; as before where there is nothing to compare."""
        if len(y_N) < 2 or len(self.ridges) == 1:
            return before
        held = min(max(round(self.held_out * len(y_N)), 1), len(y_N) - 1)
        errors_R = held_out_errors(
            h_NM[held:], y_N[held:], h_NM[:held], y_N[:held], classes=classes, ridges=self.ridges
        )
        return self.ridges[int(errors_R.argmin())]
