"""Thresholds that give the activations of each feed-forward network of a model a chosen sparsity.

Shape suffixes: T tokens, N entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.moe.dense import find_dense_ffns
from clframe.nn.frozen import call_model, evaluating
from clframe.nn.network import Network
from clframe.nn.types import Inputs
from clframe.sparse_decode.rules import PLACES, Place, Rule, expand_places
from clframe.sparsity.masking import HookPoint, Recorder, find_hook_points, replacing

TOKENS = 1024
"""Tokens that are recorded of each network."""


def find_points(model: nn.Module, place: Place, *, where: str = "calibrate.places") -> dict[str, HookPoint]:
    """Find the activations at one place, by name of their network.

    Args:
        model: The model.
        place: The place.
        where: Prefix of messages.

    Raises:
        ConfigError: The model has none there.
        UnsupportedError: A model without feed-forward networks.
    """
    names = [ffn.name for ffn in find_dense_ffns(model)]
    points = find_hook_points(model.backbone if isinstance(model, Network) else model)
    found = [point for point in points if point.role == place]
    if len(found) != len(names):
        there = [role for role in PLACES if sum(point.role == role for point in points) == len(names)]
        raise ConfigError(f"{where}: found {place}, which not all networks of the model have; use {', '.join(there)}")
    return dict(zip(names, found, strict=True))


def calibrate(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Any, Tensor | Mapping[str, Tensor] | None]],
    *,
    sparsities: Sequence[float],
    places: Iterable[Place | Literal["all"]] = ("intermediate",),
    tokens: int = TOKENS,
    predict: Callable[[nn.Module, Inputs], Any] = call_model,
) -> list[dict[str, dict[str, Rule]]]:
    """Choose a threshold for each network such that a given share of the entries of its activations is below it.

    Activations are those of the dense model. Liu et al., "Training-Free Activation Sparsity in Large Language Models"
    (2024) use such thresholds.

    Args:
        model: The dense model.
        batches: As for :func:`~clframe.sparsity.analysis.analyze`.
        sparsities: Shares of zeros, from 0 to less than 1.
        places: Places of the activations; ``all`` is ``input`` and ``intermediate``.
        tokens: Number of tokens to record of each network, from the first.
        predict: Runs the model on the inputs of a batch.

    Returns:
        For each sparsity, rules by place and network, for :func:`~clframe.sparse_decode.sparse_decoder`.

    Raises:
        ConfigError: A sparsity out of range, no tokens, no place, or one that the model lacks.
        UnknownNameError: An unknown place.
    """
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ConfigError(f"calibrate.sparsities: found {sparsity}; give a share of at least 0 and less than 1")
    wanted = expand_places(places, where="calibrate.places")
    seen: dict[str, dict[str, Recorder]] = {
        place: {name: Recorder(point, limit=tokens) for name, point in find_points(model, place).items()}
        for place in dict.fromkeys(place for one in wanted.values() for place in one)
    }
    recorders = [one for found in seen.values() for one in found.values()]
    with evaluating(model), replacing([(one.point, one) for one in recorders]):
        for inputs, _, mask in batches:
            for one in recorders:
                one.masks = mask if isinstance(mask, Mapping) else {"all": mask}
            predict(model, inputs)
            if all(one.tokens >= tokens for one in recorders):
                break
    if not all(one.tokens for one in recorders):
        raise ConfigError("calibrate.batches: found no tokens; give some")
    sizes = {place: {name: _sorted(one.rows) for name, one in found.items()} for place, found in seen.items()}
    return [
        {place: {name: _threshold(own_N, sparsity) for name, own_N in found.items()} for place, found in sizes.items()}
        for sparsity in sparsities
    ]


def _sorted(rows_TN: Tensor) -> Tensor:
    return rows_TN.abs().flatten().sort().values


def _threshold(sizes_N: Tensor, share: float) -> Rule:
    """Rule with the smallest magnitude that ``share`` of the entries are below, up to equal ones."""
    return Rule("threshold", float(sizes_N[min(round(share * len(sizes_N)), len(sizes_N) - 1)]))
