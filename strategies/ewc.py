"""Elastic weight consolidation: weights that mattered are held back by springs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.nn.network import Network
from clframe.regularization.importance import Quadratic, added, quadratic
from clframe.regularization.penalties import Springs
from clframe.regularization.sensitivity import Estimate, Labels, Scope


@dataclass(frozen=True, kw_only=True)
class EWC(Component):
    """Elastic weight consolidation (EWC): hold each weight as hard as the old classes depend on it.

    Adds ``lamb / 2 * sum_p F_p (w_p - w*_p)^2`` at every exit, ``w*`` the weights after an old experience and F the
    diagonal of the Fisher information there: the mean over samples of the squared gradient of their log-likelihood.
    An exit's penalty covers the backbone up to its tap and its own head; new rows of a classifier are free. For
    when nothing may be stored of old data; where classes come one after the other it helps little without a
    memory. Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (2017); online: Schwarz et
    al., "Progress & Compress" (2018); merged: Masana et al., "Class-incremental learning" (2022).

    Costs two numbers a weight and exit in all, however long the stream (a sum of quadratics is one), and a pass over
    the data after each experience in which every sample has its own gradient; a step costs a few operations
    over the flat weights.

    Args:
        lamb: Weight of the penalty. Gradients of well-trained networks are small, so values of 1e3 to 1e4 are usual
            there; on small data that is learnt in a few epochs 10 to 100 does.
        mode: ``separate`` keeps a quadratic for each experience, summed without loss; ``online`` one,
            ``F <- gamma F + new``, around the latest weights; ``merged`` likewise, ``F <- alpha F + (1 - alpha)
            new``, starting from zero.
        gamma: What ``online`` keeps of the old importances.
        alpha: What ``merged`` keeps of them.
        scope: ``exit``: each exit has its own penalty, which the exits' weights scale; ``last``: one penalty, from
            the last exit's Fisher; ``total``: one, from the sum of all exits' losses, over all heads.
        heads: Whether classifiers are ``covered`` by the penalty, or ``free`` as in the code of the merged form.
        labels: Labels of the log-likelihood: those ``given`` (empirical Fisher), ``sampled`` from each exit's
            prediction (the Fisher proper), or ``predicted``, each exit's arg-max.
        estimate: ``samples`` averages the squared gradients of samples. ``batches`` squares the mean gradients of
            batches, as Avalanche and many others do: ten times as fast, and about ``batch_size`` times too small
            where samples differ. ``published`` also reproduces a defect of the code of auxiliary classifiers: it
            divides by the number of samples after every batch, which makes F smaller again by as many times as
            there are batches, 39 to 78 there.
        samples: Samples to estimate on, drawn at random; 0 takes all of the experience.
        batch_size: Samples at once in that pass; it changes numbers only with ``batches`` and ``published``.
        ceiling: Largest importance; none leaves them as they are. Training by SGD diverges where learning rate *
            lamb * importance passes 2.
    """

    name: ClassVar[str] = "ewc"
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
        """Refuse numbers that mean nothing."""
        for key, ok, advice in (
            ("lamb", self.lamb >= 0, "give a number of at least 0"),
            ("gamma", 0 <= self.gamma <= 1, "give a number from 0 to 1"),
            ("alpha", 0 <= self.alpha <= 1, "give a number from 0 to 1"),
        ):
            if not ok:
                raise ConfigError(f"components.ewc.{key}: found {getattr(self, key)}; {advice}")
        _ = self._springs  # made now, it refuses sizes now

    @cached_property
    def _springs(self) -> Springs:
        return Springs(
            owner=self.name,
            scope=self.scope,
            heads=self.heads,
            samples=self.samples,
            batch_size=self.batch_size,
            ceiling=self.ceiling,
        )

    def init_state(self, network: Network) -> State:
        """Nothing is held before the first experience ends."""
        return self._springs.empty()

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """What is held, in the shapes of the grown classifiers."""
        return self._springs.prepared(network, state)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The penalty, from the second experience on."""
        return self._springs.penalty(state, lamb=self.lamb / 2)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Measure the Fisher diagonals and hold the weights as they are now."""
        return self._springs.renewed(
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
            return added(old, new)
        kept = self.gamma if self.mode == "online" else self.alpha
        return quadratic(kept * old["importance"] + fisher_P, weight_P)
