"""Deep streaming linear discriminant analysis: class means and one covariance, learned in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import (
    discriminant,
    mask_unmet_classes,
    pad_classes,
    scatter_update,
    to_double,
    to_single,
    update_means,
)
from clframe.nn.features import embed_tap, exit_features
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class SLDA(Component):
    """Deep streaming LDA (SLDA): classify frozen features by class means and one shared covariance, without gradients.

    Every exit predicts ``score_c = f' L mu_c - mu_c' L mu_c / 2`` with ``L = ((1 - e) S + e I)^-1``, f its embedded tap
    (a map's mean, the first token). Means and S are updated with each experience's samples, once, after it was trained;
    classes may reappear at any time, and nothing is forgotten. Hayes and Kanan, "Lifelong Machine Learning with Deep
    Streaming Linear Discriminant Analysis" (2020).

    Use it with backbones that are pre-trained, or trained on the first experience. Cost: one forward pass over the
    data, C F + F^2 numbers of 8 bytes per exit, and a system of F equations per experience. It owns the slot ``batch``:
    no sample is trained on.

    Args:
        shrinkage: e, from above 0 to 1 (the identity: nearest class mean). 1e-4 as published.
        covariance: ``within`` is the scatter within the classes, independent of the order of samples; ``published``
            weights each sample as the paper does, by all samples before it rather than by those of its class, so that
            the first of a class adds its square.
        train_first: Whether the first experience trains the network, with gradients, before it is frozen.
    """

    name: ClassVar[str] = "slda"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "logits"})

    shrinkage: float = 1e-4
    covariance: Literal["within", "published"] = "within"
    train_first: bool = False

    def __post_init__(self) -> None:
        """Validate the shrinkage; 0 would leave the covariance singular."""
        if not 0 < self.shrinkage <= 1:
            raise ConfigError(f"components.slda.shrinkage: found {self.shrinkage}; give a number above 0, at most 1")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the tap of every exit."""
        return network.exit_taps

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Return no experience, or with ``train_first`` the first."""
        return (0,) if self.train_first and index == 0 else ()

    def init_state(self, network: Network) -> State:
        """Return a state without samples."""
        empty = torch.empty(0, dtype=torch.float64)
        return {"taps": network.exit_taps, "count": empty, "mean": [], "scatter": [], "weight": [], "bias": []}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Accumulate the experience's samples, then solve for the weights."""
        classes, count_C, dtype = network.classes, state["count"], torch.float32
        means, scatters = list(state["mean"]), list(state["scatter"])
        for features, y_B in exit_features(network, context.experience.samples):
            for exit, values_BF in enumerate(features):
                new_BF, dtype = to_double(values_BF), to_single(values_BF).dtype
                y_B, width = y_B.to(new_BF.device), new_BF.shape[1]
                if exit == len(means):
                    means.append(new_BF.new_zeros(classes, width))
                    scatters.append(new_BF.new_zeros(width, width))
                mean_CF, before_C = pad_classes(means[exit], classes), pad_classes(count_C.to(new_BF.device), classes)
                total = before_C.sum() if self.covariance == "published" else None
                scatters[exit] = scatters[exit] + scatter_update(new_BF, y_B, mean_CF, before_C, total=total)
                means[exit], after_C = update_means(mean_CF, before_C, new_BF, y_B)
            count_C = after_C
        solved = [
            discriminant(mean_CF, scatter_FF / count_C.sum(), count_C, shrinkage=self.shrinkage)
            for mean_CF, scatter_FF in zip(means, scatters, strict=True)
        ]
        device = network.final.weight.device
        weights, biases = ([part.to(device, dtype) for part in parts] for parts in zip(*solved, strict=True))
        return {**state, "count": count_C, "mean": means, "scatter": scatters, "weight": weights, "bias": biases}

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return the scores of the discriminant, from the end of the first experience on."""
        if not state["weight"]:
            return logits_BC
        weight_CF, bias_C = state["weight"][exit], state["bias"][exit]
        scores_BC = embed_tap(taps[state["taps"][exit]]).to(weight_CF.dtype) @ weight_CF.T + bias_C
        met_C = (state["count"] > 0).to(logits_BC.device)
        return mask_unmet_classes(scores_BC, met_C, classes=logits_BC.shape[1])
