"""Elastic weight consolidation: penalize changes of weights by their Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from clframe.core.component import Component
from clframe.core.declarations import options_without_effect
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.nn.network import Network
from clframe.regularization.importance import Quadratic, add_quadratics, quadratic
from clframe.regularization.penalties import QuadraticPenalty
from clframe.regularization.sensitivity import Estimate, Labels, Scope


@dataclass(frozen=True, kw_only=True)
class EWC(Component):
    """Elastic weight consolidation (EWC): penalize changes of each weight by its Fisher information for old classes.

    Adds ``lamb / 2 * sum_p F_p (w_p - w*_p)^2`` at every exit, ``w*`` the weights after an old experience and F the
    diagonal of the Fisher information there: the mean over samples of the squared gradient of their log-likelihood. An
    exit's penalty covers the backbone up to its tap and its own head; new rows of a classifier are free.

    Use it if no old data may be stored; in class-incremental streams it helps little without a replay buffer, unless
    the cross-entropy is over the classes of the experience (``current_classes``). Cost: two numbers per weight and exit
    in total, however long the stream (a sum of quadratics is one), and a pass over the data after each experience with
    one gradient per sample; a step costs a few operations over the flat weights. Kirkpatrick
    et al., "Overcoming catastrophic forgetting in neural networks" (2017); online: Schwarz et al., "Progress &
    Compress" (2018); merged: Masana et al., "Class-incremental learning" (2022).

    Args:
        lamb: Weight of the penalty. Gradients of well-trained networks are small, so values of 1e3 to 1e4 are usual
            there; 10 to 100 suits small data learned in a few epochs.
        mode: ``separate`` keeps a quadratic for each experience, summed exactly; ``online`` one, ``F <- gamma F +
            new``, around the latest weights; ``merged`` one, ``F <- alpha F + (1 - alpha) new``, starting from zero.
        gamma: Decay of the old importances in ``online``.
        alpha: Share of the old importances in ``merged``.
        scope: ``exit``: a separate penalty for each exit, scaled by the exit weights; ``block``: the same, but an exit
            before the last covers only the stage it is attached to, as in the code of the paper on auxiliary
            classifiers (Szatkowski et al., 2025), against its text; ``last``: one penalty, from the Fisher information
            of the last exit; ``total``: one, from the sum of all exits' losses, over all heads.
        heads: Whether classifiers are ``covered`` by the penalty, or ``free`` as in the code of the merged form.
        labels: Labels of the log-likelihood: ``given`` (empirical Fisher), ``sampled`` from each exit's prediction
            (true Fisher), or ``predicted``, the arg-max of each exit.
        estimate: ``samples`` averages squared per-sample gradients. ``batches`` squares the mean gradients of batches,
            as Avalanche and many others do: ten times as fast, and about ``batch_size`` times too small if samples
            differ. ``published`` also reproduces a defect of the code of the paper on auxiliary classifiers: it divides
            by the number of samples after every batch, which reduces F further by a factor of the number of batches, 39
            to 78 there.
        samples: Samples for the estimate, drawn at random; 0 uses all of the experience.
        batch_size: Batch size of that pass; it changes numbers only with ``batches`` and ``published``.
        ceiling: Largest importance; none leaves them unbounded. Training by SGD diverges if learning rate * lamb *
            importance exceeds 2.
    """

    name: ClassVar[str] = "ewc"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    remembers_weights: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    weight: ClassVar[str] = "lamb"

    lamb: float = 10.0
    mode: Literal["separate", "online", "merged"] = "separate"
    gamma: float = 1.0
    alpha: float = 0.5
    scope: Scope = "exit"
    heads: Literal["covered", "free"] = "covered"
    labels: Labels = "given"
    estimate: Estimate = "samples"
    samples: int = 0
    batch_size: int = 128
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("lamb", self.lamb >= 0, "give a number of at least 0"),
            ("gamma", 0 <= self.gamma <= 1, "give a number from 0 to 1"),
            ("alpha", 0 <= self.alpha <= 1, "give a number from 0 to 1"),
        ):
            if not ok:
                raise ConfigError(f"components.ewc.{key}: found {getattr(self, key)}; {advice}")
        _ = self._penalty  # built here so that invalid sizes are refused at construction

    @property
    def unused_options(self) -> Mapping[str, str]:
        """Decays of other modes."""
        reason = f"mode is {self.mode}"
        return options_without_effect(
            self, (self.mode == "online", ["gamma"], reason), (self.mode == "merged", ["alpha"], reason)
        )

    @cached_property
    def _penalty(self) -> QuadraticPenalty:
        return QuadraticPenalty.of(self)

    def init_state(self, network: Network) -> State:
        """Return a state without penalty."""
        return self._penalty.empty()

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Resize the penalty to the grown classifiers."""
        return self._penalty.resize(network, state)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the penalty, from the second experience on."""
        return self._penalty.losses(state, scale=self.lamb / 2)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Estimate the Fisher diagonals and store the current weights."""
        return self._penalty.estimate(
            network, context, state, loss=F.cross_entropy, power=2, combine=self._combine,
            estimate=self.estimate, labels=self.labels,
        )  # fmt: skip

    def _combine(self, old: Quadratic | None, fisher_P: Tensor, weight_P: Tensor) -> Mapping[str, Tensor]:
        if self.mode == "merged":
            fisher_P = (1 - self.alpha) * fisher_P
        new = quadratic(fisher_P, weight_P)
        if old is None:
            return new
        if self.mode == "separate":
            return add_quadratics(old, new)
        kept = self.gamma if self.mode == "online" else self.alpha
        return quadratic(kept * old["importance"] + fisher_P, weight_P)
