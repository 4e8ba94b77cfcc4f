"""MACs of one prediction, part by part, and the exit at which a policy stops each sample.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter, Part, Predictions
from clframe.accounting.entries import PartKind
from clframe.accounting.macs import as_found
from clframe.exits import ExitPolicy
from clframe.exits.dynamic import DynamicNetwork
from clframe.moe import RoutedExperts
from clframe.moe.router import ALL
from clframe.nn.backbones.base import tap_of
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class PredictionCost:
    """The parts of one prediction, and what it costs up to each exit."""

    parts: tuple[Part, ...]
    """In the order in which they run, all experts run."""
    cost_K: tuple[int, ...]
    """MACs of a sample that goes as far as each exit, with every part on the way."""


def policy_of(learner: Learner) -> ExitPolicy | None:
    """The policy by which a prediction may stop early; None where everything is computed.

    That is so without the component ``early_exit``, where it lets all exits answer together, and where a component
    corrects the answers of all exits.
    """
    owner: Any = learner.composition.owner("prediction")
    make = getattr(owner, "policy", None)
    if make is None or getattr(owner, "rule", "first") != "first" or learner.composition.acting_at("adjust_logits"):
        return None
    policy = make(learner.state[owner.name])
    assert isinstance(policy, ExitPolicy)
    return policy


def prediction_cost(learner: Learner, x: Tensor) -> PredictionCost:
    """MACs of a prediction, part by part; the model is left as it was found.

    With a policy, what counts is what :class:`~clframe.exits.dynamic.DynamicNetwork` runs for one sample after
    another: exits that it never asks cost nothing. A batch that finished samples leave late costs more. Without one,
    every exit, what components make of their answers, and who decides.

    Args:
        learner: The model and who decides.
        x: One prepared sample as a batch.
    """
    network, policy = learner.network, policy_of(learner)
    with as_found(network), torch.no_grad(), every_expert(network), MacCounter() as counter:
        walk = _Walk(learner, lambda: counter.macs)
        if policy is None:
            walk.all_together(x)
        else:
            walk.one_by_one(x, policy)
    return PredictionCost(parts=tuple(walk.parts), cost_K=tuple(walk.cost_K))


def stops_B(scores: Sequence[Tensor], policy: ExitPolicy) -> Tensor:
    """stop_B: the exit at which each sample stops, from what every exit answers.

    Where a sample stops is where it answers, except with the fallback ``confident``: that looks back from the last.

    >>> early_BC, last_BC = torch.tensor([[4.0, 0.0], [0.1, 0.0]]), torch.zeros(2, 2)
    >>> stops_B([early_BC, last_BC], ExitPolicy(thresholds=0.9, fallback="confident")).tolist()
    [0, 1]
    """
    last = len(scores) - 1
    thresholds = policy.of_exits(len(scores))
    carried: tuple[Tensor, ...] = ()
    stop_B = scores[-1].new_full(scores[-1].shape[:1], last, dtype=torch.long)
    for exit in policy.asked(len(scores)):
        confidence_B, carried = policy.measure(exit, scores[exit], carried)
        if exit < last:
            fires_B = (confidence_B >= thresholds[exit]) & (stop_B == last)
            stop_B = torch.where(fires_B, exit, stop_B)
    return stop_B


@contextmanager
def every_expert(module: nn.Module) -> Iterator[None]:
    """Have all experts run for a while, which asks no router."""
    layers = [part for part in module.modules() if isinstance(part, RoutedExperts)]
    gates = [layer.gate for layer in layers]
    try:
        for layer in layers:
            layer.gate = ALL
        yield
    finally:
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate = gate


class _Walk:
    """Runs a prediction part by part and notes what each took."""

    def __init__(self, learner: Learner, macs: Callable[[], int]) -> None:
        self._learner, self._network, self._macs = learner, learner.network, macs
        self._noted = macs()
        self.parts: list[Part] = []
        self.cost_K = [0] * len(self._network.heads)

    def all_together(self, x: Tensor) -> None:
        """Every exit, what components make of the answers, and the decision."""
        learner, network = self._learner, self._network
        logits: list[Tensor] = []
        taps: dict[str, Tensor] = {}
        value: Any = x
        for name, stage, exits in network.plan():
            value = stage(value)
            self._note(name, "stage")
            for exit_name, exit in exits:
                logits.append(network.classify(exit, tap_of(value), logits[-1] if logits else None))
                self._note(f"exit/{exit_name}", "head", owner="exit_weights", exit=exit)
            if name in learner.taps:
                taps[name] = tap_of(value)
        corrected = learner._correct(Output(tuple(logits), taps))
        self._note("answers", "answers", owner="logits")
        joined = corrected._replace(logits=network.ensemble(corrected.logits))
        self._note("ensemble", "ensemble", owner="exit_weights")
        learner.predict(joined)
        self._note("decision", "policy", owner="prediction")
        self.cost_K[-1] = sum(part.macs for part in self.parts)

    def one_by_one(self, x: Tensor, policy: ExitPolicy) -> None:
        """As far as a sample goes that no exit is sure of."""
        network, dynamic = self._network, DynamicNetwork(self._network, policy)
        asked, computed = dynamic.asked, dynamic.computed
        logits_BC: Tensor | None = None
        ensembled: tuple[Tensor, ...] = ()
        measured: tuple[Tensor, ...] = ()
        value: Any = x
        for name, stage, exits in network.plan():
            value = stage(value)
            self._note(name, "stage")
            for exit_name, exit in exits:
                if exit in computed:
                    logits_BC = network.classify(exit, tap_of(value), logits_BC)
                    self._note(f"exit/{exit_name}", "head", owner="exit_weights")
                    scores_BC, ensembled = network.ensemble.step(exit, logits_BC, ensembled)
                    self._note(f"ensemble/{exit_name}", "ensemble", owner="exit_weights")
                if exit in asked:
                    _, measured = policy.measure(exit, scores_BC, measured)
                    self._note(f"policy/{exit_name}", "policy", owner="prediction")
                self.cost_K[exit] = self._noted

    def _note(self, name: str, kind: PartKind, *, owner: str = "", exit: int | None = None) -> None:
        """Add a part with what has been counted since the last one; what joins or corrects only where it costs."""
        macs, self._noted = self._macs() - self._noted, self._macs()
        if exit is not None:
            self.cost_K[exit] = self._noted
        if not macs and kind in ("ensemble", "answers"):
            return
        component: Any = self._learner.composition.owner(owner) if owner else None
        own = component is None or name == f"exit/{self._network.exit_names[-1]}"
        if kind == "policy" and own:
            return  # the arg-max of the last exit
        self.parts.append(Part(name=name, kind=kind, macs=macs, component="" if own else component.name))


def mean_macs(network: Network, predictions: Predictions, *, experience: int) -> float:
    """Mean MACs of a prediction after training experience ``experience``; NaN where nothing was noted.

    Exits are counted on all test samples of the experiences so far. What experts leave out, less their router, is
    measured on a few samples that run through everything, and taken off for the share of samples that reach the layer.
    """
    stops = predictions.stops(experience=experience)
    samples = sum(stop.samples for stop in stops)
    macs = predictions.expected(experience=experience)
    for layer in predictions.experts(experience=experience):
        saved = (layer.dense_macs - layer.macs) / layer.samples
        reaching = _exits_behind(network, layer.layer)
        macs -= saved * sum(stop.samples for stop in stops if stop.exit in reaching) / max(samples, 1)
    return macs


def _exits_behind(network: Network, layer: str) -> set[str]:
    """The exits that a sample reaches only through a layer: those at its stage or deeper, or on its head."""
    part = network.get_submodule(layer)
    found, passed = set[str](), False
    for _, stage, exits in network.plan():
        passed = passed or any(inner is part for inner in stage.modules())
        for name, exit in exits:
            passed = passed or any(inner is part for inner in network.heads[exit].modules())
            if passed:
                found.add(name)
    return found
