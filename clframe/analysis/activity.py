"""Which neurons fire, experience by experience: sparsity and overlap beside forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clframe.analysis.masks import Masking
from clframe.analysis.places import Inputs, answering, called, changing, places_of, require_weights
from clframe.core.types import Samples
from clframe.errors import ConfigError
from clframe.functional.sparsity import MaskKind, jaccard
from clframe.nn.network import Network


@dataclass(frozen=True, eq=False)
class Activity:
    """Hidden neurons of a model on one set of data.

    Attributes:
        active: By layer, the share of tokens in which each neuron is active: rate_N.
    """

    active: Mapping[str, Tensor]

    @property
    def sparsity(self) -> Mapping[str, float]:
        """By layer, the share of neurons that a token leaves inactive."""
        return {layer: 1 - float(rate_N.mean()) for layer, rate_N in self.active.items()}


def activity(
    model: nn.Module,
    batches: Sequence[tuple[Inputs, Tensor | None]],
    *,
    kind: MaskKind = "top_p",
    value: float = 0.99,
) -> Activity:
    """How often each hidden neuron is active, every layer measured in the unmasked model.

    A neuron is active in a token where the rule keeps it and it is not zero. With ReLU, ``value=1`` of top-p counts
    every neuron that fires at all.

    Args:
        model: Any module with feed-forward networks, or with activations.
        batches: (inputs, mask of the tokens that count, None for all).
        kind: The rule.
        value: Its p, threshold or share of neurons kept.

    Raises:
        ConfigError: No batches, or a mask that does not fit.
        UnsupportedError: A model with neither, or on the meta device.
    """
    require_weights(model)
    if not batches:
        raise ConfigError("sparsity.batches: found none; give at least one")
    places = [place for place in places_of(model) if place.role == "intermediate"]
    counts = [_Counting(place, kind=kind, value=value) for place in places]
    with answering(model), changing([(count.place, count) for count in counts]):
        for inputs, mask in batches:
            for count in counts:
                count.masks = {"all": mask}
            called(model, inputs)
    return Activity({count.place.layer: count.active_N for count in counts if count.parts})


def experience_activity(
    network: Network,
    experiences: Sequence[Samples],
    *,
    kind: MaskKind = "top_p",
    value: float = 0.99,
    limit: int = 2000,
    batch_size: int = 256,
) -> tuple[Activity, ...]:
    """The activity of a network's backbone on each experience, such as ``benchmark.test``.

    Args:
        network: Such as ``clframe.load(run).network``.
        experiences: Data of each.
        kind: As in :func:`activity`.
        value: As there.
        limit: Samples of each experience, the first ones.
        batch_size: How many at a time.

    Raises:
        ConfigError: An experience without samples.
    """
    device = network.final.weight.device
    found = []
    for samples in experiences:
        parts = torch.arange(min(len(samples), limit)).split(batch_size) if len(samples) else ()
        batches = [(samples.prepare(samples.raw(part)).to(device), None) for part in parts]
        found.append(activity(network.backbone, batches, kind=kind, value=value))
    return tuple(found)


def overlap(activities: Sequence[Activity], *, active_above: float | None = None) -> Mapping[str, Tensor]:
    """By layer, the overlap of active neurons between each two experiences: jaccard_EE, 1 on the diagonal.

    Args:
        activities: One for each experience.
        active_above: A neuron is active in an experience if it is in more than this share of its tokens; None
            compares the rates themselves.

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


class _Counting(Masking):
    """Counts what would be zero, and changes nothing: a layer is measured on what the whole model gives it."""

    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(x)
        return x
