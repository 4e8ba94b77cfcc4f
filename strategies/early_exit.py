"""Decide from all exits: early, or together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.accounting.macs import backbone_macs, cumulative_macs
from clframe.core.component import Component
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.exits import MEASURES, STATIC, ExitAnswers, ExitPolicy, Gate, Measure, Method, fit_gate, select, solve
from clframe.nn.features import exit_logits
from clframe.nn.network import Network
from clframe.nn.types import Output


@dataclass(frozen=True, kw_only=True)
class EarlyExit(Component):
    """Early exit: the first exit that is sure enough answers, or all exits answer together.

    Exit k answers where its confidence reaches its threshold. Thresholds are given, or found on held-out data
    at the end of each experience so that the expected cost stays within a budget. Accuracies are then those
    of the policy; ``clframe.nn.DynamicNetwork`` runs it and skips what is not needed. Kaya et al.,
    "Shallow-Deep Networks" (2019); Szatkowski et al., "Auxiliary Classifiers" (2025).

    Use it with ``exits`` where a prediction should cost less than the whole network. Costs nothing in training;
    with a budget or a gate, one forward pass over the held-out data after each experience (``benchmark.validation``).

    Args:
        rule: ``first`` sure exit; or, with everything computed: the ``last`` exit, the most ``confident``,
            the ``mean`` of all probabilities, the ``vote`` of all.
        measure: What confidence is: ``max_probability``, ``entropy`` (1 is certain), ``margin`` between the two
            likeliest classes, ``patience`` (p exits in a row that agree: threshold p / (p + 1)), or ``gate``, a
            logistic regression on the first three, fitted on held-out data.
        threshold: From which confidence on an exit answers: one number, or one for each exit before the last.
        budget: Instead, the share of the bare backbone's MACs that a prediction may cost on average. What is too
            little even for the first exit buys the first exit.
        solver: How a budget's thresholds are found: ``shared``, one for all exits; ``quantiles``, shares that
            fall off geometrically (MSDNet); ``coordinate``, each in turn.
        fallback: What answers where no exit is sure: the ``last``, or the most ``confident``.
    """

    name: ClassVar[str] = "early_exit"
    slots: ClassVar[frozenset[str]] = frozenset({"prediction"})

    rule: Literal["first", "last", "confident", "mean", "vote"] = "first"
    measure: Literal["max_probability", "entropy", "margin", "patience", "gate"] = "max_probability"
    threshold: float | tuple[float, ...] = 0.9
    budget: float | None = None
    solver: Method = "shared"
    fallback: Literal["last", "confident"] = "last"

    def __post_init__(self) -> None:
        """Refuse budgets that buy nothing and thresholds that never say no."""
        if self.budget is not None and not self.budget > 0:
            raise ConfigError(f"components.early_exit.budget: found {self.budget}; give a share above 0")
        thresholds = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not thresholds or min(thresholds) < 0:
            raise ConfigError(f"components.early_exit.threshold: found {self.threshold}; give numbers from 0 up")

    @property
    def needs_held_out(self) -> str:
        """A budget's thresholds and a gate come from held-out data."""
        if self.rule != "first":
            return ""
        return "budget" if self.budget is not None else "measure" if self.measure == "gate" else ""

    def init_state(self, network: Network) -> State:
        """Given thresholds, which a budget's take the place of; no exit is sure before a gate is fitted."""
        return {"thresholds": self.threshold, "gate": None}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fit the gate and find thresholds on held-out data."""
        if not self.needs_held_out or len(network.heads) == 1:
            return state
        logits, targets_N = exit_logits(network, context.experience.held_out, answer=context.answer)
        scores = network.ensemble(logits)
        gate = fit_gate(scores, targets_N) if self.measure == "gate" else None
        found = {**state, "gate": None if gate is None else dict(gate.state_dict())}
        if self.budget is None:
            return found
        cost_K = cumulative_macs(network)
        validation = ExitAnswers(
            confidence_KN=self._confidences(scores, found),
            correct_KN=torch.stack([scores_NC.argmax(1) == targets_N for scores_NC in scores]),
            cost_K=cost_K,
        )
        budget = max(self.budget * backbone_macs(network), cost_K[0])
        solution = solve(validation, method=self.solver, budget=budget, fallback=self.fallback)
        return {**found, "thresholds": solution.thresholds}

    def policy(self, state: State) -> ExitPolicy:
        """The policy as it stands; ``clframe.nn.DynamicNetwork`` takes it."""
        return ExitPolicy(measure=self._measure(state), thresholds=state["thresholds"], fallback=self.fallback)

    def predict(self, output: Output, state: State) -> Tensor:
        """The scores of each sample's answer."""
        if self.rule != "first":
            return STATIC[self.rule](output.logits).scores_BC
        return select(output.logits, self.policy(state)).scores_BC

    def _measure(self, state: State) -> Measure:
        if self.measure != "gate":
            return MEASURES[self.measure]
        if state["gate"] is None:
            return _never
        gate = Gate(1)
        gate.to(state["gate"]["weight_KD"].device).load_state_dict(state["gate"])
        return gate

    def _confidences(self, scores: Sequence[Tensor], state: State) -> Tensor:
        """confidence_KN of every exit, computed one after the other."""
        measure, found = self._measure(state), []
        carried: tuple[Tensor, ...] = ()
        for exit, scores_NC in enumerate(scores):
            confidence_N, carried = measure(exit, scores_NC, carried)
            found.append(confidence_N)
        return torch.stack(found)


def _never(exit: int, scores_BC: Tensor, carried: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """No exit is sure before a gate is fitted."""
    return scores_BC.new_zeros(len(scores_BC)), ()
