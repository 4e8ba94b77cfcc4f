"""Prediction rules of a trained model: which exit decides each sample, and the MACs spent on it.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from math import inf, isnan
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clframe.accounting import MacCounter, cumulative_macs
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.exits import ALWAYS, NEVER, STATIC, DynamicNetwork, ExitPolicy, select
from clframe.exits.curves import BudgetPoint
from clframe.exits.measured import MeasuredNetwork
from clframe.exits.policies import probability_threshold
from clframe.moe import routed_layers
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.options import format_value
from clframe.training.prediction_cost import prediction_cost, stops_B
from clframe.training.trained import TrainedModel


class Decisions(NamedTuple):
    """Decisions for one batch."""

    scores_BC: Tensor
    """In learning order; the arg-max is the class, the softmax its probability."""
    exit_B: Tensor
    """Index of the exit that decided; the last one where a rule combines all exits."""
    macs_B: Tensor
    """MACs of each prediction, up to the exit where its sample stopped."""


class PredictionRule:
    """The rule by which a model predicts.

    Without a threshold or a budget it is the strategy's own: the policy of ``early_exit`` or its combination of all
    exits, otherwise the last exit. Where the strategy allows it, samples that have stopped are not computed further.

    Args:
        model: The model.
        threshold: Largest probability from which an exit decides, the same for all exits; infinity: no sample stops
            early.
        budget: Mean cost of a prediction as a share of the bare backbone's MACs; its threshold is the one that the run
            has recorded, chosen on its validation data.
        graphs: Whether dynamic inference on CUDA uses graphs where they are measured to be faster
            (:class:`~clframe.exits.measured.MeasuredNetwork`).

    Raises:
        ConfigError: Both, a threshold outside 0 to 1, or a budget for which the run has recorded no threshold.
        UnsupportedError: Either for a model with one exit.

    Attributes:
        description: The rule, for people.
        threshold: The threshold of all exits; None for the strategy's own rule.
        simulated: Reason why exits cannot be skipped, so that MACs are those of a model that could; empty otherwise.
        counts_experts: Whether the model has experts, so that MACs depend on the tokens.
        note: Restriction of the MACs; empty where there is none.
    """

    def __init__(
        self,
        model: TrainedModel,
        *,
        threshold: float | None = None,
        budget: float | None = None,
        graphs: bool = True,
    ) -> None:
        if threshold is not None and budget is not None:
            raise ConfigError("predict: found a threshold and a budget; give one of them")
        self._model, self._learner, self._network = model, model.learner, model.network
        self.description, self.threshold, self.simulated = "last exit", threshold, ""
        self.counts_experts = bool(routed_layers(model.network))
        self.note = "MACs are the mean of each batch, since experts are chosen token by token" * self.counts_experts
        self._costs: dict[Any, Tensor] = {}
        self._policy: ExitPolicy | None = None
        self._dynamic: DynamicNetwork | None = None
        if threshold is not None or budget is not None:
            self._use_threshold(threshold, budget)
        else:
            self._use_strategy()
        self._skip_exits()
        self._measured: MeasuredNetwork | None = None
        # Graphs run no operator of torch whose MACs could be counted, as those of experts are.
        if graphs and self._dynamic is not None and not self.counts_experts and _can_record(self._network):
            self._measured = MeasuredNetwork(self._dynamic)

    @property
    def policy(self) -> ExitPolicy | None:
        """The policy by which exits decide; None where the last exit or a combination of all exits does."""
        return self._policy

    @property
    def times(self) -> str:
        """Measured times of plain inference and graphs, of which the shorter one was chosen; empty before."""
        return "" if self._measured is None else self._measured.note

    def __call__(self, x: Tensor) -> Decisions:
        """Predict a batch of prepared inputs.

        Raises:
            DataError: Scores that are NaN: training has diverged.
        """
        if self.counts_experts:
            self.cost_K(x)  # runs the model: not inside the counter
            with MacCounter() as counter:
                found = self._predict(x)
            return found._replace(macs_B=torch.full_like(found.macs_B, round(counter.macs / len(x))))
        return self._predict(x)

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Decisions:
        if self._dynamic is None:
            return self.decide(self._outputs(x), x)
        run = self._dynamic if self._measured is None else self._measured
        scores_BC, exit_B = run(x)
        return self._checked(scores_BC, exit_B, exit_B, x)

    def decide(self, output: Output, x: Tensor) -> Decisions:
        """Predict from the scores of all exits of prepared inputs ``x``, as ``Learner.adjust_logits`` returns them.

        MACs then count every expert of a model with experts.
        """
        policy, last = self._policy, len(self._network.heads) - 1
        if policy is not None:
            scores_BC, exit_B = select(output.logits, policy)
            return self._checked(scores_BC, exit_B, stops_B(output.logits, policy), x)
        rows = output.last.shape[0]  # of a language model the tokens of all windows
        exit_B = torch.full((rows,), last, dtype=torch.long, device=output.last.device)
        owner: Any = self._learner.composition.owner("prediction")
        static = STATIC.get(getattr(owner, "rule", "")) if owner is not None else None
        if static is not None:
            scores_BC, decided_B = static(output.logits)
            return self._checked(scores_BC, decided_B, exit_B, x)
        return self._checked(self._learner.predict(output), exit_B, exit_B, x)

    def _use_threshold(self, threshold: float | None, budget: float | None) -> None:
        option = "--threshold" if budget is None else "--budget"
        if len(self._network.heads) < 2:
            raise UnsupportedError(f"{option}: the model has one exit only; train with strategy='... + exits'")
        if budget is not None:
            point = _budget_point(self._model, budget)
            self.threshold = threshold = point.threshold
            samples = self._model.budgets.validation_samples if self._model.budgets is not None else 0
            chosen = f"chosen on {samples:,} validation samples" if samples else "chosen on validation data"
            self.description = f"budget {point.name} ({_describe(threshold)}, {chosen})"
        elif threshold is not None:
            self.threshold = threshold = probability_threshold(threshold, where="--threshold")
            self.description = _describe(threshold)
        assert threshold is not None
        self._policy = ExitPolicy(thresholds=threshold)

    def _use_strategy(self) -> None:
        owner: Any = self._learner.composition.owner("prediction")
        if owner is None:
            return
        make, rule = getattr(owner, "policy", None), getattr(owner, "rule", "first")
        if make is not None and rule == "first":
            self._policy = make(self._learner.state[owner.name])
            self.description = f"policy of {owner.name}"
        else:
            self.description = f"rule '{rule}' of {owner.name}" if rule in STATIC else f"rule of {owner.name}"

    def _skip_exits(self) -> None:
        """Use dynamic inference where the result is the same and exits can be skipped."""
        learner, policy = self._learner, self._policy
        owner = learner.composition.owner("prediction")
        if policy is None and owner is not None:
            return  # the rule uses all exits
        if learner.simulated_exits:
            self.simulated = learner.simulated_exits if policy is not None else ""
        elif policy is None:
            never = ExitPolicy(thresholds=inf)
            self._dynamic = DynamicNetwork(self._network, never, adjust=learner.exit_corrector())
        elif policy.fallback == "last":
            self._dynamic = DynamicNetwork(self._network, policy, adjust=learner.exit_corrector())
        else:
            self.simulated = "the fallback to the most confident exit is decided from all exits"

    def _outputs(self, x: Tensor) -> Output:
        return self._learner.adjust_logits(self._network(x, taps=self._learner.taps))

    def _checked(self, scores_BC: Tensor, exit_B: Tensor, stop_B: Tensor, x: Tensor) -> Decisions:
        if bool(scores_BC.isnan().any()):
            raise DataError("predict: the model returns NaN; training has diverged, train again with a lower rate")
        return Decisions(scores_BC, exit_B, self.cost_K(x).to(stop_B.device)[stop_B])

    def cost_K(self, x: Tensor) -> Tensor:
        """MACs of a sample that stops at each exit, with confidences, corrections and ensembles on the way."""
        choice = self._network.choice
        # The cost depends on the adapters too: a domain may have none, one that is not known takes a pass with each.
        key = tuple(x.shape[1:]), None if choice is None else (choice.known, choice.domain)
        if key not in self._costs:
            if self._policy is not None and self._learner.simulated_exits:
                cost_K = cumulative_macs(self._network)
            else:
                policy = self._policy if self._dynamic is None else self._dynamic.policy
                cost_K = prediction_cost(self._learner, x[:1], policy=policy).cost_K
            self._costs[key] = torch.tensor(cost_K)
        return self._costs[key]


def _can_record(network: Network) -> bool:
    return network.final.weight.device.type == "cuda"


def _describe(threshold: float) -> str:
    if threshold in (ALWAYS, NEVER):
        return "every sample stops at the first exit" if threshold == ALWAYS else "no sample stops early"
    return f"threshold {threshold:.4g}"


def _budget_point(model: TrainedModel, budget: float) -> BudgetPoint:
    """The recorded point of a budget.

    Raises:
        ConfigError: No validation data, or a budget that was not recorded.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real) or not budget > 0:
        found = format_value(budget)
        raise ConfigError(f"--budget: found {found}; give a share of the backbone's MACs above 0, such as 0.5")
    recorded = model.budgets
    if recorded is None or recorded.points is None:
        reason = "no record of budgets" if recorded is None else recorded.undefined
        raise ConfigError(
            f"--budget: the run has no thresholds ({reason}); train with benchmark.validation=0.1, or give --threshold"
        )
    known = [point for point in recorded.points if not isnan(point.budget_share)]
    for point in known:
        if abs(point.budget_share - budget) < 1e-9:
            if point.undefined:
                raise ConfigError(f"--budget: {point.name} cannot be kept ({point.undefined}); give a larger one")
            return point
    names = ", ".join(f"{point.budget_share:g}" for point in known if not point.undefined)
    raise ConfigError(f"--budget: found {budget:g}, the run has recorded {names or 'none'}; give one, or --threshold")
