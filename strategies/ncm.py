"""Nearest class mean: another way to answer, whatever trains the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import among, mean_scores
from clframe.functional.prototypes import widened
from clframe.nn.features import class_sums, embedded
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.replay.buffers import Kept


@dataclass(frozen=True, kw_only=True)
class NCM(Component):
    """Nearest class mean (NCM): each exit answers with the class whose mean is nearest in its own features.

    ``score_c = -sharpness * || f / |f| - mu_c / |mu_c| ||^2`` in place of the logits, at every exit; a tap is
    averaged over its map, or its first token is taken. Where a memory is kept, the means are those of its samples,
    taken anew at the end of each experience; classes that it does not hold, all of them where there is none, have
    the mean of their training samples as they were when they were learnt. Unlike a trained classifier it is not
    biased towards new classes. Use it with any strategy, since nothing changes in training. Costs a pass over
    the memory, or over an experience's training data, for each experience. Mensink et al., "Distance-Based Image
    Classification" (2013); Rebuffi et al., "iCaRL" (2017).

    Args:
        sharpness: Factor on the distances: the answer does not depend on it, its confidence does. Squared
            distances are at most 4, so for early exits try 10 to 30.
    """

    name: ClassVar[str] = "ncm"
    slots: ClassVar[frozenset[str]] = frozenset({"logits"})

    sharpness: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a factor that would turn the order around."""
        if not self.sharpness > 0:
            raise ConfigError(f"components.ncm.sharpness: found {self.sharpness}; give a number above 0")

    def taps(self, network: Network) -> Sequence[str]:
        """Where the exits are."""
        return tuple(dict.fromkeys(network.exit_taps))

    def init_state(self, network: Network) -> State:
        """No means before the first experience ends."""
        return {"taps": network.exit_taps, "sums": None, "known_C": None}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Means of the memory; of this experience's training data for classes that it does not hold."""
        samples, memory = context.experience.samples, context.memory
        held = set() if memory is None else set(memory["y"].unique().tolist())
        missing = sorted(set(context.experience.classes) - held)
        found = state
        if missing:
            sums, count_C = class_sums(network, samples)
            chosen_C = among(torch.arange(len(count_C), device=count_C.device), missing)
            # A class met before goes on: its sum grows, and the mean is one over all its samples.
            found = _merged(found, sums, chosen_C & (count_C > 0), keep=1.0)
        if memory is not None:
            sums, count_C = class_sums(network, Kept(memory, samples))
            found = _merged(found, sums, count_C > 0, keep=0.0)
        return found

    def adjust_logits(self, output: Output, state: State) -> Output:
        """Minus the squared distance to each class mean, at every exit; logits before there are means."""
        if state["sums"] is None:
            return output
        scores = [
            self.sharpness * mean_scores(embedded(output.taps[tap]), sum_CF, state["known_C"], classes=l_BC.shape[1])
            for tap, sum_CF, l_BC in zip(state["taps"], state["sums"], output.logits, strict=True)
        ]
        return output._replace(logits=tuple(scores))


def _merged(state: State, sums: Sequence[Tensor], chosen_C: Tensor, *, keep: float) -> State:
    """The state with the sums of the classes ``chosen_C``, on top of ``keep`` times those that were there."""
    if state["sums"] is None:
        before = tuple(torch.zeros_like(sum_CF) for sum_CF in sums)
        known_C = torch.zeros_like(chosen_C)
    else:
        before = tuple(widened(sum_CF, len(chosen_C)) for sum_CF in state["sums"])
        known_C = widened(state["known_C"], len(chosen_C))
    merged = tuple(
        torch.where(chosen_C[:, None], keep * old_CF + new_CF, old_CF)
        for old_CF, new_CF in zip(before, sums, strict=True)
    )
    return {**state, "sums": merged, "known_C": known_C | chosen_C}
