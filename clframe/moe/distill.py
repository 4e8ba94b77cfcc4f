"""Distillation of attention projections into two-layer networks.

Shape suffixes: N tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.moe.convert import Call, plain_call
from clframe.moe.pipeline import require_finite
from clframe.moe.projections import (
    Projection,
    ProjectionSite,
    check_dense,
    find_projections,
    forward_hooks,
    install_projections,
    make_projections,
    replace_module,
    unpack_attentions,
)
from clframe.nn.frozen import evaluating
from clframe.process_state import preserve_generators
from clframe.seeding import derive_seed


@dataclass(frozen=True, eq=False, kw_only=True)
class Distillation:
    """Result of replacing projections.

    Attributes:
        sites: The replaced layers.
        projections: The new networks by name.
        losses: Mean squared error of each epoch, averaged over projections.
    """

    sites: tuple[ProjectionSite, ...]
    projections: Mapping[str, Projection]
    losses: tuple[float, ...]


def replace_projections(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    dropout: float = 0.05,
    call: Call = plain_call,
    seed: int = 0,
) -> Distillation:
    """Replace every query, key, value and output projection by a small network distilled from it.

    Each network is trained with Adam on the mean squared error to the layer's output, for the tokens that reach the
    layer in the dense model; all are trained in the same pass. Layers that change the width (keys and values in
    grouped-query attention) and cross-attention are not replaced. The model is unchanged if an error is raised.

    Args:
        model: Dense model; changed in place.
        batches: Unlabeled inputs, used in this order in each epoch.
        epochs: Passes over ``batches``; 0 leaves the networks untrained.
        learning_rate: Of Adam.
        dropout: Dropout probability of the hidden neurons in training.
        call: Runs the model on a batch.
        seed: Seed of the networks' weights and dropout.

    Raises:
        UnsupportedError: No such layer, a converted model, or one in half precision or without weights.
        ConfigError: No batches, or an option out of range.
        DivergenceError: A loss that is not finite.
    """
    if not len(batches) or epochs < 0 or not 0 <= dropout < 1:
        raise ConfigError(
            f"moe: found {len(batches)} batches for {epochs} epochs with dropout {dropout} to replace projections; "
            f"give one batch or more, 0 epochs or more, dropout from 0 to below 1"
        )
    check_dense(model)
    before = unpack_attentions(model)
    try:
        sites = find_projections(model, next(iter(batches)), call=call)
        made = make_projections(model, sites, dropout=dropout, seed=seed)
        losses = _distill(
            model, sites, made, batches, epochs=epochs, learning_rate=learning_rate, call=call, seed=seed
        )
    except BaseException:  # an interrupt, too, leaves the model unchanged
        for name, attention in before.items():
            replace_module(model, model.get_submodule(name), attention)
        raise
    return Distillation(sites=sites, projections=install_projections(model, sites, made), losses=tuple(losses))


def _distill(
    model: nn.Module,
    sites: Sequence[ProjectionSite],
    made: Sequence[Sequence[Projection]],
    batches: Sequence[Any],
    *,
    epochs: int,
    learning_rate: float,
    call: Call,
    seed: int,
) -> list[float]:
    parameters = [p for own in made for part in own for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    layers = [model.get_submodule(site.name) for site in sites]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(id(layer), []).append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

    losses = []
    # Dropout draws from the global generators, whose state the caller gets back.
    with forward_hooks(layers, add), preserve_generators(), torch.enable_grad():
        torch.manual_seed(derive_seed(seed, "moe", "dropout"))
        for _ in range(epochs):
            total = torch.zeros(())
            for batch in batches:
                seen.clear()
                with evaluating(model):
                    call(model, batch)
                errors = [_error(networks, seen[id(layer)]) for layer, networks in zip(layers, made, strict=True)]
                loss = torch.stack(errors).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach().cpu()
            losses.append(float(total) / len(batches))
            require_finite(losses, of="projection distillation")
    return losses


def _error(parts: Sequence[Projection], seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    x_ND, y_NO = (torch.cat(rows) for rows in zip(*seen, strict=True))
    return F.mse_loss(torch.cat([part(x_ND) for part in parts], 1), y_NO)
