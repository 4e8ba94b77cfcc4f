"""Nearest class mean: predict by the distance to class means, independent of the training method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import among, nearest_mean_scores
from clframe.functional.prototypes import pad_classes
from clframe.nn.features import class_sums, embed_tap
from clframe.nn.network import Network
from clframe.replay.buffers import BufferSamples


@dataclass(frozen=True, kw_only=True)
class NCM(Component):
    """Nearest class mean (NCM): each exit predicts the class whose mean is nearest in its own features.

    ``score_c = -sharpness * || f / |f| - mu_c / |mu_c| ||^2`` replaces the logits at every exit; a tap is averaged over
    its map, or its first token is used. With a replay buffer the means are those of its samples, recomputed at the end
    of each experience; classes that it does not contain, or all classes without a buffer, have the mean of their
    training samples as computed when they were learned. Unlike a trained classifier it is not biased towards new
    classes. Mensink et al., "Distance-Based Image Classification" (2013); Rebuffi et al., "iCaRL" (2017).

    Use it with any strategy, since it changes nothing in training. Cost: a pass over the buffer, or over an
    experience's training data, per experience.

    Args:
        sharpness: Factor on the distances: it changes confidence, not the prediction. Squared distances are at most 4,
            so for early exits try 10 to 30.
    """

    name: ClassVar[str] = "ncm"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"logits"})

    sharpness: float = 1.0

    def __post_init__(self) -> None:
        """Validate the factor."""
        if not self.sharpness > 0:
            raise ConfigError(f"components.ncm.sharpness: found {self.sharpness}; give a number above 0")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the taps of the exits."""
        return tuple(dict.fromkeys(network.exit_taps))

    def init_state(self, network: Network) -> State:
        """Return a state without means."""
        return {"taps": network.exit_taps, "sums": None, "known_C": None}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Compute means of the buffer, and of this experience's training data for classes not in the buffer."""
        samples, memory = context.experience.samples, context.memory
        held = set() if memory is None else set(memory["y"].unique().tolist())
        missing = sorted(set(context.experience.classes) - held)
        found = state
        if missing:
            sums, count_C = class_sums(network, samples)
            chosen_C = among(torch.arange(len(count_C), device=count_C.device), missing)
            # The sum of a class seen before keeps growing, so that its mean is over all its samples.
            found = _merge(found, sums, chosen_C & (count_C > 0), keep=1.0)
        if memory is not None:
            sums, count_C = class_sums(network, BufferSamples(memory, samples))
            found = _merge(found, sums, count_C > 0, keep=0.0)
        return found

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return minus the squared distance to each class mean; the logits until means exist."""
        if state["sums"] is None:
            return logits_BC
        features_BF, sum_CF = embed_tap(taps[state["taps"][exit]]), state["sums"][exit]
        return self.sharpness * nearest_mean_scores(features_BF, sum_CF, state["known_C"], classes=logits_BC.shape[1])


def _merge(state: State, sums: Sequence[Tensor], chosen_C: Tensor, *, keep: float) -> State:
    """Return the state with the sums of the classes ``chosen_C`` added to ``keep`` times the previous ones."""
    if state["sums"] is None:
        before = tuple(torch.zeros_like(sum_CF) for sum_CF in sums)
        known_C = torch.zeros_like(chosen_C)
    else:
        before = tuple(pad_classes(sum_CF, len(chosen_C)) for sum_CF in state["sums"])
        known_C = pad_classes(state["known_C"], len(chosen_C))
    merged = tuple(
        torch.where(chosen_C[:, None], keep * old_CF + new_CF, old_CF)
        for old_CF, new_CF in zip(before, sums, strict=True)
    )
    return {**state, "sums": merged, "known_C": known_C | chosen_C}
