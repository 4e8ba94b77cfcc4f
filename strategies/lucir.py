"""LUCIR: cosine classifiers, a constraint on feature directions, and a margin between old and new classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.exits.features import exit_embeddings
from clframe.functional.representation import cosine_distance, separation
from clframe.nn.frozen import freeze
from clframe.nn.heads import CosineLinear
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class LUCIR(Component):
    """Learning a unified classifier incrementally via rebalancing (LUCIR): cosine classifiers with stable features.

    Every exit classifies by ``eta cos(w_c, features)``. Added are ``less_forget sqrt(old / new classes) (1 - cos(f,
    f_old))`` on its embedded tap, against the frozen model of the last experience, and ``separate sum_j max(m - cos_y +
    cos_j, 0)`` for replayed samples and the most similar new classes. The last ReLU before the features, which the
    paper removes, stays as in the backbone; rows of new classes are initialized at random, not imprinted. Hou et al.,
    "Learning a Unified Classifier Incrementally via Rebalancing" (2019).

    Use it with a replay buffer, ``lucir + er``, which the last term needs; without one that term is zero. Cost: a
    forward pass of the old model per step and a copy of it.

    Args:
        less_forget: Weight lambda_base of the constraint on features; 5 for CIFAR-100, 10 for ImageNet as published.
            In runs of a few epochs on digits and MNIST 1 was 1.8 points better than 5 on held-out data.
        separate: Weight of the separation of classes.
        margin: m of the separation, in cosines.
        negatives: New classes that each old sample is separated from.
        eta: Initial scale of the cosines; it is learned, one per exit. The authors' code starts at 1, from where 160
            epochs of SGD reach useful values and short runs do not: 10 was 3.0 points better on held-out data.
        old: Whether rows of old classes are ``fixed``, as published, or ``learn``. (Coupled weight decay with Adam may
            rotate a fixed row; SGD and AdamW only shorten it, which changes nothing.)
    """

    name: ClassVar[str] = "lucir"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"classifier"})
    terms: ClassVar[tuple[str, ...]] = ("less_forget", "separate")

    less_forget: float = 1.0
    separate: float = 1.0
    margin: float = 0.5
    negatives: int = 2
    eta: float = 10.0
    old: Literal["fixed", "learn"] = "fixed"

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("less_forget", self.less_forget >= 0, "give a number of at least 0"),
            ("separate", self.separate >= 0, "give a number of at least 0"),
            ("margin", self.margin >= 0, "give a number of at least 0"),
            ("negatives", self.negatives >= 1, "give at least 1"),
            ("eta", self.eta > 0, "give a number above 0"),
        ):
            if not ok:
                raise ConfigError(f"components.lucir.{key}: found {getattr(self, key)}; {advice}")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the taps of all exits."""
        return network.exit_taps

    def setup_network(self, network: Network) -> None:
        """Install cosine classifiers at every exit."""
        network.classify_with(partial(CosineLinear, scale=self.eta))

    def init_state(self, network: Network) -> State:
        """Return a state without teacher and new classes."""
        return {"teacher": None, "new": None, "factor": 0.0}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fix the rows of old classes and scale the constraint by the ratio of old to new classes."""
        past, classes = context.experience.past, context.experience.classes
        new = sorted(set(classes) - set(past))
        if self.old == "fixed":
            for head in network.heads:
                head.fix(set(past) - set(classes))  # type: ignore[operator]
        ids = torch.tensor(new, device=network.final.weight.device) if past and new else None
        return {**state, "new": ids, "factor": sqrt(len(past) / len(classes))}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the constraint and the separation, from the second experience on."""
        terms: dict[str, Tensor] = {}
        network = step.network
        if state["teacher"] is not None:
            teacher = step.run(state["teacher"], taps=network.exit_taps)
            features = exit_embeddings(network, step.output)
            distance_K = cosine_distance(features, exit_embeddings(network, teacher))
            terms["less_forget"] = self.less_forget * state["factor"] * distance_K
        if state["new"] is not None:
            separate_K = separation(
                step.output.logits,
                step.batch.y,
                new=state["new"],
                margin=self.margin,
                negatives=self.negatives,
                scales=[head.scale for head in network.heads],  # type: ignore[misc]
            )
            terms["separate"] = self.separate * separate_K
        return terms

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher."""
        return {**state, "teacher": freeze(network)}
