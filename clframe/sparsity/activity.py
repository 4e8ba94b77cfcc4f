"""Active neurons by experience: rates, overlap, and their record for results.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.nn.backbones.from_transformers import token_mask
from clframe.nn.frozen import call_model, evaluating
from clframe.nn.network import Network
from clframe.nn.types import Inputs, Samples
from clframe.records import read_record
from clframe.sparsity.functional import MaskKind, jaccard
from clframe.sparsity.masking import Masker, find_hook_points, replacing, require_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivity:
    """Activity of the hidden neurons of one layer, always measured on the same samples of each experience.

    Padding of texts does not count. Shares are rounded to four decimals, finer than a few hundred samples can resolve.
    """

    neurons: int
    sparsity: float
    """Share of inactive neurons per token, mean over the experiences so far."""
    sparsity_E: tuple[float, ...] = ()
    """Share of inactive neurons per token, on each experience."""
    overlap_E: tuple[float, ...] = ()
    """Jaccard overlap of the newest experience's active neurons with each one's, in the present network."""
    kept_E: tuple[float, ...] = ()
    """Jaccard overlap of each experience's active neurons with those just after it was learned; NaN where the layer
    did not exist then."""

    @property
    def overlap(self) -> float:
        """Mean overlap of the newest experience with the earlier ones; NaN before the second."""
        return _mean(self.overlap_E[:-1])

    @property
    def kept(self) -> float:
        """Mean of ``kept_E`` over the earlier experiences; NaN before the second."""
        return _mean(self.kept_E[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertActivity:
    """Use of the experts of one layer, measured on the same samples."""

    experts: int
    per_token: float
    """Executed experts per token, mean over the experiences so far."""
    per_token_E: tuple[float, ...] = ()
    """Executed experts per token, on each experience."""
    unused: int
    """Experts that no token of any experience used."""
    macs_share: float = math.nan
    """MACs of the layer, its router included, over those with all experts; mean over experiences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivityRecord:
    """Activity of hidden neurons and experts by layer; empty for a network without them."""

    samples_E: tuple[int, ...] = ()
    """Measured samples of each experience."""
    layers: Mapping[str, LayerActivity] = field(default_factory=dict)
    experts: Mapping[str, ExpertActivity] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Mean sparsity over layers; NaN without layers."""
        return _mean([layer.sparsity for layer in self.layers.values()])

    @property
    def experts_per_token(self) -> float:
        """Mean executed experts per token over layers; NaN without layers."""
        return _mean([layer.per_token for layer in self.experts.values()])

    @property
    def overlap_E(self) -> tuple[float, ...]:
        """Mean over layers of :attr:`LayerActivity.overlap_E`."""
        return tuple(map(_mean, zip(*(layer.overlap_E for layer in self.layers.values()), strict=True)))

    @property
    def kept_E(self) -> tuple[float, ...]:
        """Mean over layers of :attr:`LayerActivity.kept_E`."""
        return tuple(map(_mean, zip(*(layer.kept_E for layer in self.layers.values()), strict=True)))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ActivityRecord:
        """Rebuild the record from what ``dataclasses.asdict`` returned."""
        return read_record(cls, content, prefix="activity.")


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    found = [value for value in values if not math.isnan(value)]
    return math.fsum(found) / len(found) if found else float("nan")


@dataclass(frozen=True, eq=False)
class Activity:
    """Activity of the hidden neurons of a model on one set of data.

    Attributes:
        active: By layer, the share of tokens in which each neuron is active: rate_N.
    """

    active: Mapping[str, Tensor]

    @property
    def sparsity(self) -> Mapping[str, float]:
        """Share of inactive neurons per token, by layer."""
        return {layer: 1 - float(rate_N.mean()) for layer, rate_N in self.active.items()}


def activity(
    model: nn.Module,
    batches: Sequence[tuple[Inputs, Tensor | None]],
    *,
    kind: MaskKind = "top_p",
    value: float = 0.99,
    predict: Callable[[nn.Module, Inputs], Any] = call_model,
) -> Activity:
    """Measure how often each hidden neuron is active, in the unmasked model.

    A neuron is active in a token where the rule keeps it and it is not zero. With ReLU, ``value=1`` of top-p counts
    every neuron that is not zero.

    Args:
        model: Any module with feed-forward networks, or with activations.
        batches: (inputs, mask of the tokens that count, None for all).
        kind: The rule.
        value: p, the threshold or the share of neurons kept.
        predict: Runs the model on the inputs of a batch.

    Raises:
        ConfigError: No batches, or a mask that does not fit.
        UnsupportedError: A model without either, or on the meta device.
    """
    require_weights(model)
    if not batches:
        raise ConfigError("sparsity.batches: found none; give at least one")
    points = [point for point in find_hook_points(model) if point.role == "intermediate"]
    counts = [_Counting(point, kind=kind, value=value) for point in points]
    with evaluating(model), replacing([(count.point, count) for count in counts]):
        for inputs, mask in batches:
            for count in counts:
                count.masks = {"all": mask}
            predict(model, inputs)
    return Activity({count.point.layer: count.active_N for count in counts if count.parts})


def experience_activity(
    network: Network,
    experiences: Sequence[Samples],
    *,
    kind: MaskKind = "top_p",
    value: float = 0.99,
    limit: int = 2000,
    batch_size: int = 256,
) -> tuple[Activity, ...]:
    """Measure the activity of a network's backbone on each experience, such as ``benchmark.test``; padding is left out.

    Args:
        network: Such as ``clframe.load(run).network``.
        experiences: Data of each experience.
        kind: As in :func:`activity`.
        value: As in :func:`activity`.
        limit: Number of samples of each experience, from the first.
        batch_size: Samples per batch.

    Raises:
        ConfigError: An experience without samples.
    """
    device = network.final.weight.device
    found = []
    for samples in experiences:
        parts = torch.arange(min(len(samples), limit)).split(batch_size) if len(samples) else ()
        inputs = [samples.prepare(samples.raw(part)).to(device) for part in parts]
        batches = [(x, token_mask(network.backbone, x)) for x in inputs]
        found.append(activity(network.backbone, batches, kind=kind, value=value))
    return tuple(found)


def overlap(activities: Sequence[Activity], *, active_above: float | None = None) -> Mapping[str, Tensor]:
    """Compute by layer the overlap of active neurons between experiences: jaccard_EE, 1 on the diagonal.

    Args:
        activities: One per experience.
        active_above: A neuron is active in an experience if it is active in more than this share of the tokens; None
            compares the rates.

    >>> a = Activity({"layer": torch.tensor([1.0, 0.5, 0.0])})
    >>> b = Activity({"layer": torch.tensor([0.5, 0.5, 0.5])})
    >>> overlap([a, b])["layer"][0].tolist()
    [1.0, 0.5]
    >>> overlap([a, b], active_above=0.2)["layer"][0, 1].item()
    0.6666...
    """
    layers = list(activities[0].active) if activities else []

    def rate(one: Activity, layer: str) -> Tensor:
        return one.active[layer] if active_above is None else one.active[layer] > active_above

    return {
        layer: torch.tensor(
            [[jaccard(rate(a, layer), rate(b, layer)) for b in activities] for a in activities], dtype=torch.float64
        )
        for layer in layers
    }


class _Counting(Masker):
    """Counts what a mask would zero and returns x unchanged: each layer is measured in the unmasked model."""

    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(x)
        return x
