"""Deep streaming linear discriminant analysis: class means and one covariance, learnt in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import discriminant, exact, for_met_classes, scatter_of, updated_means, widened
from clframe.nn.features import embedded, exit_features
from clframe.nn.network import Network
from clframe.nn.types import Output


@dataclass(frozen=True, kw_only=True)
class SLDA(Component):
    """Deep streaming LDA (SLDA): class means and one shared covariance of frozen features answer, no gradients.

    Every exit answers ``score_c = f' L mu_c - mu_c' L mu_c / 2`` with ``L = ((1 - e) S + e I)^-1``, f its embedded
    tap (a map's mean, the first token). Means and S run on over each experience's samples, once, after it began;
    classes may come back at any time, and nothing is forgotten. For backbones that are pre-trained, or trained on
    the first experience. It costs one forward pass over the data, C F + F^2 numbers of 8 bytes an exit, and a
    system of F equations an experience. It owns the slot ``batch``: no sample is trained on. Hayes and Kanan,
    "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis" (2020).

    Args:
        shrinkage: e, from above 0 to 1 (the identity: nearest class mean). 1e-4 as published.
        covariance: ``within`` is the scatter within the classes, whatever the order of samples; ``published``
            weighs each sample as the paper does, by all samples before it rather than by those of its class, so
            that the first of a class adds its square.
        train_first: Whether the first experience trains the network, with gradients, before it is frozen.
    """

    name: ClassVar[str] = "slda"
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "logits"})

    shrinkage: float = 1e-4
    covariance: Literal["within", "published"] = "within"
    train_first: bool = False

    def __post_init__(self) -> None:
        """Refuse a shrinkage that leaves the covariance singular."""
        if not 0 < self.shrinkage <= 1:
            raise ConfigError(f"components.slda.shrinkage: found {self.shrinkage}; give a number above 0, at most 1")

    def taps(self, network: Network) -> Sequence[str]:
        """Every exit's own."""
        return network.exit_taps

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Nothing is trained on, but the first experience where that is wanted."""
        return (0,) if self.train_first and index == 0 else ()

    def init_state(self, network: Network) -> State:
        """No samples yet."""
        empty = torch.empty(0, dtype=torch.float64)
        return {"taps": network.exit_taps, "count": empty, "mean": [], "scatter": [], "weight": [], "bias": []}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Stream over the experience's samples, then solve for the weights."""
        classes, count_C, dtype = network.classes, state["count"], torch.float32
        means, scatters = list(state["mean"]), list(state["scatter"])
        for features, y_B in exit_features(network, context.experience.samples):
            for exit, values_BF in enumerate(features):
                new_BF, dtype = exact(values_BF), values_BF.dtype
                y_B, width = y_B.to(new_BF.device), new_BF.shape[1]
                if exit == len(means):
                    means.append(new_BF.new_zeros(classes, width))
                    scatters.append(new_BF.new_zeros(width, width))
                mean_CF, before_C = widened(means[exit], classes), widened(count_C.to(new_BF.device), classes)
                total = before_C.sum() if self.covariance == "published" else None
                scatters[exit] = scatters[exit] + scatter_of(new_BF, y_B, mean_CF, before_C, total=total)
                means[exit], after_C = updated_means(mean_CF, before_C, new_BF, y_B)
            count_C = after_C
        solved = [
            discriminant(mean_CF, scatter_FF / count_C.sum(), count_C, shrinkage=self.shrinkage)
            for mean_CF, scatter_FF in zip(means, scatters, strict=True)
        ]
        device = network.final.weight.device
        weights, biases = ([part.to(device, dtype) for part in parts] for parts in zip(*solved, strict=True))
        return {**state, "count": count_C, "mean": means, "scatter": scatters, "weight": weights, "bias": biases}

    def adjust_logits(self, output: Output, state: State) -> Output:
        """The scores of the discriminant at every exit, from the end of the first experience on."""
        if not state["weight"]:
            return output
        met_C, logits = (state["count"] > 0).to(output.last.device), []
        for tap, weight_CF, bias_C in zip(state["taps"], state["weight"], state["bias"], strict=True):
            scores_BC = embedded(output.taps[tap]).to(weight_CF.dtype) @ weight_CF.T + bias_C
            logits.append(for_met_classes(scores_BC, met_C, classes=output.last.shape[1]))
        return output._replace(logits=tuple(logits))
