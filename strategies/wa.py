"""Weight aligning: scale the rows of new classes to the norm of old ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.exits.features import heads_with_rows, read_rows, write_rows
from clframe.functional.prototypes import alignment
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class WA(Component):
    """Weight aligning (WA): after each experience, scale the new rows of every classifier to the norm of the old ones.

    Trained on many new samples and few old ones, a classifier gives new classes longer rows, hence larger logits.
    ``W_new <- W_new * mean |w_old| / mean |w_new|`` at every exit corrects that; biases are unchanged. Zhao et al.,
    "Maintaining Discrimination and Fairness in Class Incremental Learning" (2020); their clipping of weights to
    positive values during training is left out, as in most implementations.

    Use it with a replay buffer and distillation (``er + lwf + wa``). Cost: one pass over the classifiers after each
    experience. Classes seen before count as old if they reappear. Teachers, stored logits, importances and corrections
    of other components are those of the scaled network, the one that predicts. Cosine classifiers, whose rows act by
    direction only, are unchanged.

    Args:
        direction: ``both``, as published: new rows shorter than the old ones are lengthened too, which favors new
            classes further and can reduce accuracy considerably if every batch is balanced or training is short;
            ``shrink`` leaves those unchanged.
    """

    name: ClassVar[str] = "wa"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    changes_network: ClassVar[bool] = True

    direction: Literal["both", "shrink"] = "both"

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Scale the rows of the classes just learned, with a separate factor at each exit."""
        old = sorted(context.experience.past)
        new = sorted(set(context.experience.classes) - set(old))
        if not old or not new:
            return state
        for _, head in heads_with_rows(network):
            weight_CF, bias_C = read_rows(head)
            scale = alignment(weight_CF[old], weight_CF[new])
            weight_CF[new] *= scale if self.direction == "both" else scale.clamp_max(1)
            write_rows(head, weight_CF, bias_C)
        return state
