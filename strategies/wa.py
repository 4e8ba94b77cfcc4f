"""Weight aligning: new rows of a classifier as long as the old ones."""

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
    """Weight aligning (WA): after each experience, scale the new rows of every classifier to the length of the old.

    Trained on many new samples and few old ones, a classifier gives new classes longer rows, hence larger logits.
    ``W_new <- W_new * mean |w_old| / mean |w_new|`` at every exit takes that back; biases stay. Meant for use with a
    memory and distillation (``er + lwf + wa``). Zhao et al., "Maintaining Discrimination and Fairness in Class
    Incremental Learning" (2020); their clipping of weights to positive values while training is left out, as in
    most implementations.

    Costs nothing but one pass over the classifiers after each experience. Classes that were met before count as old
    when they come again. Components act in the order of their names: a teacher that ``lwf`` keeps is the model
    before its newest rows were scaled, which in a softmax over these classes alone is another temperature.
    Cosine classifiers, whose rows count by direction alone, are left as they are.

    Args:
        direction: ``both``, as published: new rows that came out shorter than the old ones are lengthened too, which
            favors new classes further and can cost much accuracy where old and new samples are balanced in
            every batch or training is short; ``shrink`` leaves those as they are.
    """

    name: ClassVar[str] = "wa"

    direction: Literal["both", "shrink"] = "both"

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Scale the rows of the classes just learnt, at every exit by its own factor."""
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
