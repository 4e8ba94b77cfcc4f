"""SimpleCIL: classify by the mean feature of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import cosines, mask_unmet_classes, pad_classes, to_double, update_means
from clframe.nn.features import embed_tap, exit_features
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class SimpleCIL(Component):
    """SimpleCIL: predict by the cosine of frozen features with the mean feature of each class, without gradients.

    Every exit predicts ``score_c = scale * cos(f, mu_c)``, f its embedded tap (a map's mean, the first token). Zhou et
    al., "Revisiting Class-Incremental Learning with Pre-Trained Models" (2023).

    Use it as the baseline for methods on pre-trained backbones. Cost: one forward pass over the data and C F numbers of
    8 bytes per exit. It owns the slot ``batch``: no sample is trained on.

    Args:
        scale: Factor on the cosines. It changes confidence, not the prediction: 1 as published, which leaves
            probabilities near uniform; 10 to 30 for early exits.
        train_first: Whether the first experience trains the network, with gradients, before it is frozen.
    """

    name: ClassVar[str] = "simplecil"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "logits"})

    scale: float = 1.0
    train_first: bool = False

    def __post_init__(self) -> None:
        """Validate the scale."""
        if not self.scale > 0:
            raise ConfigError(f"components.simplecil.scale: found {self.scale}; give a number above 0")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the tap of every exit."""
        return network.exit_taps

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Return no experience, or with ``train_first`` the first."""
        return (0,) if self.train_first and index == 0 else ()

    def init_state(self, network: Network) -> State:
        """Return a state without samples."""
        return {"taps": network.exit_taps, "count": torch.empty(0, dtype=torch.float64), "mean": []}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Update the class means with the experience's samples."""
        classes, count_C, means = network.classes, state["count"], list(state["mean"])
        for features, y_B in exit_features(network, context.experience.samples):
            for exit, values_BF in enumerate(features):
                new_BF = to_double(values_BF)
                if exit == len(means):
                    means.append(new_BF.new_zeros(classes, new_BF.shape[1]))
                before_C = pad_classes(count_C.to(new_BF.device), classes)
                means[exit], after_C = update_means(
                    pad_classes(means[exit], classes), before_C, new_BF, y_B.to(new_BF.device)
                )
            count_C = after_C
        return {**state, "count": count_C, "mean": means}

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return scaled cosines, from the end of the first experience on."""
        if not state["mean"]:
            return logits_BC
        features_BF, met_C = embed_tap(taps[state["taps"][exit]]), (state["count"] > 0).to(logits_BC.device)
        scores_BC = self.scale * cosines(features_BF, state["mean"][exit].to(features_BF))
        return mask_unmet_classes(scores_BC, met_C, classes=logits_BC.shape[1])
