"""Attention projections trained to be small networks: each learns to answer what its layer answers.

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
from clframe.moe.projections import (
    Place,
    Projection,
    as_teacher,
    check_dense,
    drawn_projections,
    find_projections,
    hooked,
    open_attentions,
    put_all,
    put_everywhere,
)
from clframe.seeding import derive_seed


@dataclass(frozen=True, eq=False, kw_only=True)
class Distilled:
    """What became of the projections.

    Attributes:
        places: Where they were.
        projections: What now stands there, by name.
        losses: Of each epoch, the mean over projections of their mean squared errors.
    """

    places: tuple[Place, ...]
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
) -> Distilled:
    """Put a network in place of every query, key, value and output projection, and train it to match the layer.

    Each is trained by Adam on the mean squared error to what the layer answers, on the tokens that reach the layer in
    the dense model; all of them in one pass. Layers that do not keep the width (keys and values of grouped
    queries) and attentions over another sequence stay as they are. Nothing has changed where an error is raised.

    Args:
        model: Dense; changed in place.
        batches: Inputs, in each epoch in this order; no labels.
        epochs: Passes; with 0 the networks stay as they are drawn.
        learning_rate: Of Adam.
        dropout: Of the hidden neurons, in training.
        call: Runs the model on a batch.
        seed: Of the networks' weights.

    Raises:
        UnsupportedError: No such layer, a converted model, or one in half precision or without weights.
        ConfigError: No batches, or an option out of range.
    """
    if not len(batches) or epochs < 0 or not 0 <= dropout < 1:
        raise ConfigError(
            f"moe: found {len(batches)} batches for {epochs} epochs with dropout {dropout} to replace projections; "
            f"give one batch or more, 0 epochs or more, dropout from 0 to below 1"
        )
    check_dense(model)
    before = open_attentions(model)
    try:
        places = find_projections(model, next(iter(batches)), call=call)
        made = drawn_projections(model, places, dropout=dropout, seed=seed)
        losses = _distill(
            model, places, made, batches, epochs=epochs, learning_rate=learning_rate, call=call, seed=seed
        )
    except BaseException:
        for name, attention in before.items():
            put_everywhere(model, model.get_submodule(name), attention)
        raise
    return Distilled(places=places, projections=put_all(model, places, made), losses=tuple(losses))


def _distill(
    model: nn.Module,
    places: Sequence[Place],
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
    layers = [model.get_submodule(place.name) for place in places]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(id(layer), []).append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

    losses = []
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with hooked(layers, see), torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.manual_seed(derive_seed(seed, "moe", "dropout"))
        for _ in range(epochs):
            total = torch.zeros(())
            for batch in batches:
                seen.clear()
                with as_teacher(model):
                    call(model, batch)
                own = [_error(part, seen[id(layer)]) for layer, part in zip(layers, made, strict=True)]
                loss = torch.stack(own).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach().cpu()
            losses.append(float(total) / len(batches))
    return losses


def _error(parts: Sequence[Projection], seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    x_ND, y_NO = (torch.cat(rows) for rows in zip(*seen, strict=True))
    return F.mse_loss(torch.cat([part(x_ND) for part in parts], 1), y_NO)
