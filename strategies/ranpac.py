"""RanPAC: ridge regression on random features of a frozen network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import (
    held_out_errors,
    mask_unmet_classes,
    pad_classes,
    random_features,
    ridge_regression,
    to_double,
    to_single,
)
from clframe.nn.features import embed_tap, exit_features
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class RanPAC(Component):
    """RanPAC: random features of a frozen network and a ridge regression over all data so far, without gradients.

    Every exit predicts ``h' (G + r I)^-1 Q`` with ``h = relu(f' W)``, f its embedded tap (a map's mean, the first
    token), W drawn once from N(0, 1), ``G = sum h h'`` and ``Q = sum h y'`` over every sample seen, y one-hot. G and Q
    do not depend on the order of experiences, so nothing is forgotten. r is selected in each experience by the error on
    a share of its samples, held out of a regression on the others; then all samples are used. McDonnell et al.,
    "RanPAC: Random Projections and Pre-trained Models for Continual Learning" (2023).

    Use it with pre-trained backbones. Cost: one forward pass over the data, M^2 + F M + M C numbers of 8 bytes per exit
    (8 MB for M = 1000, 800 MB for 10000), and M^3 operations per experience. It owns the slot ``batch``: no sample is
    trained on.

    Args:
        projection: M, random features: several times the width of f. 10000 as published, for ViT-B/16 and its 768.
        ridges: Candidate values of r, ascending. A single value is used as given. 1e-8 to 1e8 as published.
        held_out: Share of an experience's samples used to select r. 0.2 as published. At most M samples take part.
        train_first: Whether the first experience trains the network, with gradients, before it is frozen.
    """

    name: ClassVar[str] = "ranpac"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "logits"})

    projection: int = 1000
    ridges: tuple[float, ...] = tuple(10.0**power for power in range(-8, 9))
    held_out: float = 0.2
    train_first: bool = False

    def __post_init__(self) -> None:
        """Validate the options; a ridge parameter of 0 would leave the system singular."""
        for key, ok, advice in (
            ("projection", self.projection >= 1, "give at least 1 feature"),
            ("ridges", self.ridges and all(ridge > 0 for ridge in self.ridges), "give numbers above 0"),
            ("held_out", 0 < self.held_out < 1, "give a share between 0 and 1"),
        ):
            if not ok:
                raise ConfigError(f"components.ranpac.{key}: found {getattr(self, key)}; {advice}")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the tap of every exit."""
        return network.exit_taps

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Return no experience, or with ``train_first`` the first."""
        return (0,) if self.train_first and index == 0 else ()

    def init_state(self, network: Network) -> State:
        """Return a state without samples."""
        return {"taps": network.exit_taps, "count": torch.empty(0, dtype=torch.long), "exits": []}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Accumulate the experience's samples in random order, select the ridge parameter and solve."""
        samples, classes, count_C = context.experience.samples, network.classes, state["count"]
        order_N = torch.randperm(len(samples), generator=context.generator)
        exits = [{**sums, "gram": sums["gram"].clone()} for sums in state["exits"]]
        first: list[list[Tensor]] = [[] for _ in network.heads]  # up to M samples, to select the ridge parameter
        seen = 0
        for features, y_B in exit_features(network, samples, order=order_N):
            exits = exits or [self._new_sums(values_BF, context.generator) for values_BF in features]
            targets_BC = F.one_hot(y_B, classes)
            count_C = pad_classes(count_C.to(y_B.device), classes) + targets_BC.sum(0)
            for sums, rows, values_BF in zip(exits, first, features, strict=True):
                h_BM = to_double(random_features(values_BF.to(sums["projection"]), sums["projection"]))
                sums["gram"].addmm_(h_BM.T, h_BM)
                sums["cross"] = pad_classes(sums["cross"].T, classes).T + h_BM.T @ targets_BC.to(h_BM)
                if seen < self.projection:
                    rows.append(h_BM[: self.projection - seen])
            seen += len(y_B)
        y_N = samples.y[order_N.to(samples.y.device)][: self.projection]
        for sums, rows in zip(exits, first, strict=True):
            sums["ridge"] = self._select_ridge(torch.cat(rows), y_N.to(rows[0].device), classes, before=sums["ridge"])
            weight_MC = ridge_regression(sums["gram"], sums["cross"], ridge=sums["ridge"])
            sums["weight"] = weight_MC.to(sums["projection"])
        return {**state, "count": count_C, "exits": exits}

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return linear scores of the random features, from the end of the first experience on."""
        if not state["exits"]:
            return logits_BC
        sums, met_C = state["exits"][exit], (state["count"] > 0).to(logits_BC.device)
        features_BF = embed_tap(taps[state["taps"][exit]]).to(sums["projection"])
        scores_BC = random_features(features_BF, sums["projection"]) @ sums["weight"]
        return mask_unmet_classes(scores_BC, met_C, classes=logits_BC.shape[1])

    def _new_sums(self, features_BF: Tensor, generator: Generator) -> dict[str, Any]:
        """Return an exit's empty sums, with the middle ridge parameter until samples select one."""
        projection_FM = torch.randn(features_BF.shape[1], self.projection, generator=generator)
        empty_MM = to_double(features_BF).new_zeros(self.projection, self.projection)
        return {
            "projection": projection_FM.to(to_single(features_BF)),
            "gram": empty_MM,
            "cross": empty_MM[:, :0],
            "ridge": self.ridges[len(self.ridges) // 2],
        }

    def _select_ridge(self, h_NM: Tensor, y_N: Tensor, classes: int, *, before: float) -> float:
        """Return the value with the smallest error on the first samples; unchanged if nothing can be compared."""
        if len(y_N) < 2 or len(self.ridges) == 1:
            return before
        held = min(max(round(self.held_out * len(y_N)), 1), len(y_N) - 1)
        errors_R = held_out_errors(
            h_NM[held:], y_N[held:], h_NM[:held], y_N[:held], classes=classes, ridges=self.ridges
        )
        return self.ridges[int(errors_R.argmin())]
