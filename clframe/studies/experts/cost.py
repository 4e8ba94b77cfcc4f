"""What one sample costs in MACs up to each exit of a model, and which layers lie before which exit.

Shape suffixes: K exits, L converted layers, B batch, C classes, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter
from clframe.analysis.places import Inputs, answering
from clframe.nn.network import Network

Answers = Callable[[nn.Module, Inputs], Sequence[Tensor]]
"""scores_BC of each exit, or scores_BTC of the next token."""


def exit_macs(model: nn.Module, inputs: Inputs, answers: Answers) -> Tensor:
    """cost_K of one sample."""
    with answering(model), MacCounter() as counter:
        if not isinstance(model, Network):
            answers(model, inputs)
            return torch.tensor([counter.macs], dtype=torch.float64)
        costs: dict[int, int] = {}
        value, logits_BC = inputs, None
        for _, stage, exits in model.plan():
            value = stage(value)
            tap = value if isinstance(value, Tensor) else value[0]
            for _, exit in exits:
                logits_BC = model.classify(exit, tap, logits_BC)
                costs[exit] = counter.macs
    return torch.tensor([costs[exit] for exit in sorted(costs)], dtype=torch.float64)


def within_exits(model: nn.Module, names: Sequence[str]) -> Tensor:
    """within_KL: 1 where a layer runs before an exit answers."""
    if not isinstance(model, Network):
        return torch.ones(1, len(names), dtype=torch.float64)
    taps, stages = model.exit_taps, {}
    for name in names:
        _, _, at = name.partition("backbone.stages.")
        stages[name] = int(at.partition(".")[0]) if at else 0
    last = [model.backbone.tap(tap) for tap in taps]
    return torch.tensor([[float(stages[name] <= end) for name in names] for end in last], dtype=torch.float64)


def tensors_of(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """All tensors that a model is called with, by name or place."""
    if isinstance(inputs, Tensor):
        return [("", inputs)]
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [(str(name), value) for name, value in pairs if isinstance(value, Tensor)]


def first_of(inputs: Inputs) -> Inputs:
    """The inputs of the first sample."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {name: value[:1] for name, value in inputs.items()}
    return tuple(value[:1] for value in inputs)
