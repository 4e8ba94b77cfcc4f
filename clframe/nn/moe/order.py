"""Where the neurons of experts lie, for whoever keeps something for each of their weights while they are regrouped.

Shape suffixes: E experts, F neurons, P weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clframe.nn.moe.routed import routed_layers

ROWS = ("up", "up_bias", "gate", "gate_bias", "down")
"""Parameters of experts that hold one row for each neuron."""


def neuron_orders(model: nn.Module) -> dict[str, Tensor]:
    """order_F of every parameter with a row for each neuron of experts, by its name, as it is now."""
    return {
        f"{name}.experts.{row}": layer.experts.order_F.clone()
        for name, layer in routed_layers(model).items()
        for row in ROWS
        if getattr(layer.experts, row) is not None
    }


def followed(
    model: nn.Module, names: Sequence[str], values_P: Tensor, before: Mapping[str, Tensor]
) -> Tensor:
    """values_P of some parameters in the order in which their neurons lie now.

    Args:
        model: Holds the parameters.
        names: Of the parameters, in the order of the values.
        values_P: One value for each weight, as :func:`~clframe.functional.importance.flat` lays them out.
        before: :func:`neuron_orders` when the values were as they are.
    """
    if not before:
        return values_P
    now = neuron_orders(model)
    parameters = [model.get_parameter(name) for name in names]
    parts = []
    for name, part_P in zip(names, values_P.split([p.numel() for p in parameters]), strict=True):
        if name in before and not torch.equal(before[name], now[name]):
            place_F = before[name].argsort()[now[name]]  # where the neuron that lies here now lay before
            part_P = part_P.view(len(place_F), -1)[place_F].flatten()
        parts.append(part_P)
    return torch.cat(parts)
