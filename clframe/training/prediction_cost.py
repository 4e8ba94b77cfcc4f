"""MACs of one prediction, part by part, and the exits at which a policy stops samples.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter, Part, count_macs, cumulative_macs
from clframe.accounting.entries import PartKind
from clframe.accounting.macs import evaluation_mode
from clframe.exits import ExitPolicy
from clframe.exits.dynamic import DynamicNetwork
from clframe.moe.routed import override, routed_layers
from clframe.moe.router import ALL
from clframe.nn.backbones.stages import tap_of
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class PredictionCost:
    """Parts of one prediction, and its cost up to each exit."""

    parts: tuple[Part, ...]
    """In the order in which they run, with all experts on."""
    cost_K: tuple[int, ...]
    """MACs of a sample that stops at each exit, with every part before it."""


def policy_of(learner: Learner) -> ExitPolicy | None:
    """Return the policy by which a prediction may stop early; None if everything is computed.

    None without the component ``early_exit``, where its rule uses all exits, and where a component corrects the logits
    of all exits together.
    """
    owner: Any = learner.composition.owner("prediction")
    make = getattr(owner, "policy", None)
    if make is None or getattr(owner, "rule", "first") != "first" or learner.composition.acting_at("adjust_logits"):
        return None
    policy = make(learner.state[owner.name])
    assert isinstance(policy, ExitPolicy)
    return policy


def prediction_cost(learner: Learner, x: Tensor, *, policy: ExitPolicy | None = None) -> PredictionCost:
    """Count the MACs of a prediction, part by part; the model is not changed.

    With a policy, the parts are those that :class:`~clframe.exits.dynamic.DynamicNetwork` runs for a single sample:
    exits whose confidence does not count cost nothing. A batch that finished samples leave late costs more. Without a
    policy, every exit counts, then the correction of logits, the ensemble and the component that predicts.

    Args:
        learner: The model and its strategy.
        x: One prepared sample as a batch.
        policy: Exit policy; None: that of the strategy, see :func:`policy_of`.
    """
    network, policy = learner.network, policy or policy_of(learner)
    with evaluation_mode(network), torch.no_grad(), every_expert(network), MacCounter() as counter:
        run = _PartCounter(learner, lambda: counter.macs)
        if policy is None:
            run.without_policy(x)
        else:
            run.with_policy(x, policy)
    return PredictionCost(parts=tuple(run.parts), cost_K=tuple(run.cost_K))


def exit_costs(network: Network, *, counts: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Return cost_K of :func:`~clframe.accounting.cumulative_macs`, the last one with all passes of a prediction.

    A network that chooses between variants of its weights needs a pass with each.

    Args:
        network: The network.
        counts: What :func:`~clframe.accounting.stage_macs` returns for it, if it has been counted before.
    """
    cost_K = cumulative_macs(network, counts=counts)
    return cost_K if network.choice is None else (*cost_K[:-1], count_macs(network, network.input_shape))


def stops_B(scores: Sequence[Tensor], policy: ExitPolicy) -> Tensor:
    """Return stop_B, the exit at which each sample stops, from the scores of every exit.

    A sample's prediction is that of the exit where it stops, except with the fallback ``confident``: a sample that
    reaches the last exit then takes the most confident of all.

    >>> early_BC, last_BC = torch.tensor([[4.0, 0.0], [0.1, 0.0]]), torch.zeros(2, 2)
    >>> stops_B([early_BC, last_BC], ExitPolicy(thresholds=0.9, fallback="confident")).tolist()
    [0, 1]
    """
    last = len(scores) - 1
    thresholds = policy.of_exits(len(scores))
    carried: tuple[Tensor, ...] = ()
    stop_B = scores[-1].new_full(scores[-1].shape[:1], last, dtype=torch.long)
    for exit in policy.confidence_exits(len(scores)):
        confidence_B, carried = policy.measure(exit, scores[exit], carried)
        if exit < last:
            fires_B = (confidence_B >= thresholds[exit]) & (stop_B == last)
            stop_B = torch.where(fires_B, exit, stop_B)
    return stop_B


def every_expert(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which all experts are on and routers off."""
    return override(routed_layers(module), "gate", lambda _: ALL)


class _PartCounter:
    """Runs a prediction part by part and counts each."""

    def __init__(self, learner: Learner, macs: Callable[[], int]) -> None:
        self._learner, self._network, self._macs = learner, learner.network, macs
        self._counted = macs()
        self.parts: list[Part] = []
        self.cost_K = [0] * len(self._network.heads)

    def without_policy(self, x: Tensor) -> None:
        """Run every exit, the correction of logits, the ensemble and the component that predicts."""
        learner, network = self._learner, self._network
        logits: list[Tensor] = []
        taps: dict[str, Tensor] = {}
        value: Any = x
        for name, stage, exits in network.plan():
            value = stage(value)
            self._add_part(name, "stage")
            for exit_name, exit in exits:
                logits.append(network.classify(exit, tap_of(value), logits[-1] if logits else None))
                self._add_part(f"exit/{exit_name}", "head", owner="exit_weights", exit=exit)
            if name in learner.taps:
                taps[name] = tap_of(value)
        corrected = learner.correct_logits(Output(tuple(logits), taps))
        self._add_part("answers", "answers", owner="logits")
        joined = corrected._replace(logits=network.ensemble(corrected.logits))
        self._add_part("ensemble", "ensemble", owner="exit_weights")
        learner.predict(joined)
        self._add_part("decision", "policy", owner="prediction")
        self._add_variants(x)
        self.cost_K[-1] = sum(part.macs for part in self.parts)

    def _add_variants(self, x: Tensor) -> None:
        """Add the passes with other variants of the weights, between which the network chooses."""
        choice = self._network.choice
        if choice is None:
            return
        once = sum(part.macs for part in self.parts if part.kind in ("stage", "head"))
        self._network(x)
        macs, self._counted = self._macs() - self._counted - once, self._macs()
        if macs:
            self.parts.append(Part(name="other variants", kind="answers", macs=macs, component=choice.owner))

    def with_policy(self, x: Tensor, policy: ExitPolicy) -> None:
        """Run what a sample passes whose confidence reaches no threshold."""
        network, dynamic, adjust = self._network, DynamicNetwork(self._network, policy), self._learner.exit_corrector()
        logits_BC: Tensor | None = None
        ensembled: tuple[Tensor, ...] = ()
        measured: tuple[Tensor, ...] = ()
        value: Any = x
        for name, stage, exits in network.plan():
            value = stage(value)
            self._add_part(name, "stage")
            for exit_name, exit in exits:
                if exit in dynamic.computed_exits:
                    logits_BC = network.classify(exit, tap_of(value), logits_BC)
                    self._add_part(f"exit/{exit_name}", "head", owner="exit_weights")
                    adjusted_BC = logits_BC
                    if adjust is not None:
                        adjusted_BC = adjust(exit, logits_BC, {name: tap_of(value)})
                        self._add_part(f"answers/{exit_name}", "answers", owner="logits")
                    scores_BC, ensembled = network.ensemble.step(exit, adjusted_BC, ensembled)
                    self._add_part(f"ensemble/{exit_name}", "ensemble", owner="exit_weights")
                if exit in dynamic.confidence_exits:
                    _, measured = policy.measure(exit, scores_BC, measured)
                    self._add_part(f"policy/{exit_name}", "policy", owner="prediction")
                self.cost_K[exit] = self._counted
        if network.choice is not None:
            self._add_variants(x)
            self.cost_K[-1] = sum(part.macs for part in self.parts)

    def _add_part(self, name: str, kind: PartKind, *, owner: str = "", exit: int | None = None) -> None:
        """Add a part with the MACs since the last one; ensembles and corrections only if they cost any."""
        macs, self._counted = self._macs() - self._counted, self._macs()
        if exit is not None:
            self.cost_K[exit] = self._counted
        if not macs and kind in ("ensemble", "answers"):
            return
        component: Any = self._learner.composition.owner(owner) if owner else None
        own = component is None or name == f"exit/{self._network.exit_names[-1]}"
        if kind == "policy" and own:
            return  # the arg-max of the last exit
        self.parts.append(Part(name=name, kind=kind, macs=macs, component="" if own else component.name))
