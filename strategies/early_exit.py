"""Predictions from exits: early exit by confidence, or a combination of all exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.accounting.macs import backbone_macs, cumulative_macs
from clframe.core.component import Component
from clframe.core.declarations import options_without_effect
from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.exits import (
    CONFIDENCE_MEASURES,
    STATIC,
    BudgetRule,
    ConfidenceMeasure,
    ExitEvaluation,
    ExitPolicy,
    FittedConfidence,
    Method,
    select,
    solve,
)
from clframe.exits.learned import held_out_confidences
from clframe.exits.policies import fitted_class, restore_confidence
from clframe.nn.features import exit_logits
from clframe.nn.network import Network
from clframe.nn.types import Output


@dataclass(frozen=True, kw_only=True)
class EarlyExit(Component):
    """Early exit: predict with the first exit whose confidence reaches its threshold, or combine all exits.

    Thresholds are given, or solved on held-out data at the end of each experience so that the expected cost is within a
    budget. Reported accuracies are those of the policy; ``clframe.load(run).dynamic()`` executes it and skips
    computation. Kaya et al., "Shallow-Deep Networks" (2019); Szatkowski et al., "Auxiliary Classifiers" (2025).

    Use it with ``exits`` to make predictions cheaper than the whole network. Costs nothing in training; with a
    budget or a fitted measure, one forward pass over the held-out data after each experience
    (``benchmark.validation``).

    Args:
        rule: ``first``: the first exit that reaches its threshold; or, with all exits computed: the ``last`` exit, the
            most ``confident``, the ``mean`` of all probabilities, the ``vote`` of all.
        measure: Confidence measure: ``max_probability``, ``entropy`` (1 is certain), ``margin`` between the two
            likeliest classes, ``patience`` (p consecutive exits that agree: threshold p / (p + 1)), ``gate`` (a
            logistic regression on the first three, fitted on held-out data), ``failure`` (a small network per exit,
            fitted there to predict that stopping is right or continuing futile), or one registered by a package.
        threshold: Confidence from which an exit predicts: one number, or one for each exit before the last.
        budget: Alternative to ``threshold``: mean cost of a prediction as a share of the bare backbone's MACs. A
            budget below the cost of the first exit is raised to it. Of a list, the first one decides predictions; the
            thresholds of all are solved, and results have an operating point for each.
        solver: Thresholds of a budget: ``shared``, one for all exits; ``quantiles``, geometrically distributed shares
            of samples (MSDNet); ``coordinate``, one per exit by coordinate search.
        budget_rule: Choice within a budget: ``best`` validation accuracy, or ``one_standard_error``: the highest shared
            threshold within one standard error of the best, which stops early only where that gains more than noise.
        fallback: Prediction where no exit reaches its threshold: of the ``last`` exit, or the most ``confident``.
    """

    name: ClassVar[str] = "early_exit"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"prediction"})

    rule: Literal["first", "last", "confident", "mean", "vote"] = "first"
    measure: str = "max_probability"
    threshold: float | tuple[float, ...] = 0.9
    budget: float | tuple[float, ...] | None = None
    solver: Method = "shared"
    budget_rule: BudgetRule = "best"
    fallback: Literal["last", "confident"] = "last"

    def __post_init__(self) -> None:
        """Refuse budgets and thresholds out of range and unknown measures."""
        CONFIDENCE_MEASURES.get(self.measure, where="components.early_exit.measure")
        if self.budget is not None and not (self.budgets and min(self.budgets) > 0):
            wanted = "shares" if isinstance(self.budget, tuple) else "a share"
            raise ConfigError(f"components.early_exit.budget: found {self.budget}; give {wanted} above 0")
        thresholds = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not thresholds or min(thresholds) < 0:
            raise ConfigError(f"components.early_exit.threshold: found {self.threshold}; give numbers of at least 0")
        if self.rule != "first":
            others = [each for each in fields(self) if each.name != "rule"]
            given = [each.name for each in others if getattr(self, each.name) != each.default]
            if given:
                raise ConfigError(
                    f"components.early_exit.{given[0]}: found {getattr(self, given[0])} with rule {self.rule}, which "
                    f"computes all exits; use rule=first, or leave it out"
                )
        if self.budget_rule != "best" and self.solver != "shared":
            raise ConfigError(
                f"components.early_exit.budget_rule: found {self.budget_rule} with solver {self.solver}; "
                f"use solver=shared"
            )

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets, the one of predictions first."""
        if self.budget is None:
            return ()
        return self.budget if isinstance(self.budget, tuple) else (self.budget,)

    @property
    def needs_held_out(self) -> str:
        """The option that needs held-out data: ``budget``, or ``measure`` where it has parameters to fit."""
        if self.rule != "first":
            return ""
        return "budget" if self.budget is not None else "measure" if self._fitted is not None else ""

    @property
    def unused_options(self) -> Mapping[str, str]:
        """The threshold next to a budget, and how a budget is solved without one."""
        return options_without_effect(
            self,
            (self.budget is not None, ["solver", "budget_rule"], "there is no budget"),
            (self.budget is None, ["threshold"], "the budget replaces it"),
        )

    def init_state(self, network: Network) -> State:
        """The given thresholds, replaced where a budget is solved, and no parameters of the measure.

        ``solutions`` is only there with several budgets: their thresholds, by budget.

        Raises:
            ConfigError: Thresholds in another number than that of the exits before the last.
        """
        exits = len(network.heads)
        if isinstance(self.threshold, tuple) and len(self.threshold) != exits - 1:
            raise ConfigError(
                f"components.early_exit.threshold: found {len(self.threshold)} thresholds for {exits} exits; give one "
                f"number, or {exits - 1}: one for each exit but the last"
            )
        # "gate" holds the parameters of any fitted measure: checkpoints have had that key since there was one measure.
        return {"thresholds": self.threshold, "gate": None, "exits": exits}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fit the confidence measure and solve thresholds on held-out data."""
        if not self.needs_held_out or len(network.heads) == 1:
            return state
        logits, targets_N = exit_logits(network, context.experience.held_out, forward=context.corrected_output)
        scores = network.ensemble(logits)
        parameters = None if self._fitted is None else dict(self._fitted.fit(scores, targets_N).state_dict())
        state = {**state, "gate": parameters}
        if self.budget is None:
            return state
        cost_K = cumulative_macs(network)
        validation = ExitEvaluation(
            confidence_KN=held_out_confidences(
                self._confidence_measure(state), scores, targets_N, method=self.solver
            ),
            correct_KN=torch.stack([scores_NC.argmax(1) == targets_N for scores_NC in scores]),
            cost_K=cost_K,
        )
        backbone = backbone_macs(network)
        solved = [
            solve(
                validation, method=self.solver, budget=max(share * backbone, cost_K[0]), fallback=self.fallback,
                rule=self.budget_rule,
            ).thresholds
            for share in self.budgets
        ]  # fmt: skip
        state = {**state, "thresholds": solved[0]}
        if len(solved) > 1:
            state["solutions"] = dict(zip(self.budgets, solved, strict=True))
        return state

    def policy(self, state: State) -> ExitPolicy:
        """The current exit policy, for ``DynamicNetwork``."""
        measure = self._confidence_measure(state)
        return ExitPolicy(measure=measure, thresholds=state["thresholds"], fallback=self.fallback)

    def predict(self, output: Output, state: State) -> Tensor:
        """scores_BC of the exit that predicts each sample, or of the combination of all exits."""
        if self.rule != "first":
            return STATIC[self.rule](output.logits).scores_BC
        return select(output.logits, self.policy(state)).scores_BC

    @property
    def _fitted(self) -> type[FittedConfidence] | None:
        """The class of the measure where it has parameters to fit."""
        return fitted_class(self.measure)

    def _confidence_measure(self, state: State) -> ConfidenceMeasure:
        return restore_confidence(self.measure, state["gate"], exits=state.get("exits", 1))
