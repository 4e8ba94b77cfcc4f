"""SimpleCIL: the mean feature of each class is its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import cosines, exact, for_met_classes, updated_means, widened
from clframe.nn.features import embedded, exit_features
from clframe.nn.network import Network
from clframe.nn.types import Output


@dataclass(frozen=True, kw_only=True)
class SimpleCIL(Component):
    """SimpleCIL: frozen features answer by their cosine with the mean feature of each class, no gradients.

    Every exit answers ``score_c = scale * cos(f, mu_c)``, f its embedded tap (a map's mean, the first token). For
    pre-trained backbones, whose other methods have to beat it. It costs one forward pass over the data and C F
    numbers of 8 bytes an exit. It owns the slot ``batch``: no sample is trained on. Zhou et al., "Revisiting
    Class-Incremental Learning with Pre-Trained Models" (2023).

    Args:
        scale: Factor on the cosines. Answers do not depend on it, confidences do: 1 as published, which leaves
            probabilities near uniform; 10 to 30 for early exits.
        train_first: Whether the first experience trains the network, with gradients, before it is frozen.
    """

    name: ClassVar[str] = "simplecil"
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "logits"})

    scale: float = 1.0
    train_first: bool = False

    def __post_init__(self) -> None:
        """Refuse a scale that turns the answers round."""
        if not self.scale > 0:
            raise ConfigError(f"components.simplecil.scale: found {self.scale}; give a number above 0")

    def taps(self, network: Network) -> Sequence[str]:
        """Every exit's own."""
        return network.exit_taps

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Nothing is trained on, but the first experience where that is wanted."""
        return (0,) if self.train_first and index == 0 else ()

    def init_state(self, network: Network) -> State:
        """No samples yet."""
        return {"taps": network.exit_taps, "count": torch.empty(0, dtype=torch.float64), "mean": []}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Stream over the experience's samples."""
        classes, count_C, means = network.classes, state["count"], list(state["mean"])
        for features, y_B in exit_features(network, context.experience.samples):
            for exit, values_BF in enumerate(features):
                new_BF = exact(values_BF)
                if exit == len(means):
                    means.append(new_BF.new_zeros(classes, new_BF.shape[1]))
                before_C = widened(count_C.to(new_BF.device), classes)
                means[exit], after_C = updated_means(
                    widened(means[exit], classes), before_C, new_BF, y_B.to(new_BF.device)
                )
            count_C = after_C
        return {**state, "count": count_C, "mean": means}

    def adjust_logits(self, output: Output, state: State) -> Output:
        """Scaled cosines at every exit, from the end of the first experience on."""
        if not state["mean"]:
            return output
        met_C, logits = (state["count"] > 0).to(output.last.device), []
        for tap, mean_CF in zip(state["taps"], state["mean"], strict=True):
            features_BF = embedded(output.taps[tap])
            scores_BC = self.scale * cosines(features_BF, mean_CF.to(features_BF.dtype).to(features_BF.device))
            logits.append(for_met_classes(scores_BC, met_C, classes=output.last.shape[1]))
        return output._replace(logits=tuple(logits))
