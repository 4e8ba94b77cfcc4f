"""Active neurons of a model on each of several parts of its data: experiences of a run, domains of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from clframe.data.target import Target
from clframe.metrics.continual import forgetting_E
from clframe.nn.types import Inputs
from clframe.sparsity import activity
from clframe.sparsity.activity import Activity, overlap
from clframe.sparsity.functional import baseline_sparsity
from clframe.sparsity.study_batches import with_mask

ACTIVE = 0.99
"""A neuron is active in a token if top-p with this p keeps it."""


@dataclass(frozen=True, kw_only=True)
class PartActivity:
    """Activity of a model on each of several parts of its data.

    Attributes:
        sparsity: By layer, the share of inactive neurons per token on each part.
        gaussian: Sparsity of a Gaussian vector under the same rule.
        overlap: By layer, Jaccard overlap of the rates of activity between parts.
    """

    sparsity: Mapping[str, tuple[float, ...]]
    gaussian: float
    overlap: Mapping[str, tuple[tuple[float, ...], ...]]

    @property
    def mean_sparsity(self) -> tuple[float, ...]:
        """Sparsity on each part, mean over layers."""
        return tuple(sum(values) / len(values) for values in zip(*self.sparsity.values(), strict=True))

    @property
    def mean_overlap(self) -> tuple[tuple[float, ...], ...]:
        """Overlap between parts, mean over layers."""
        stacked = torch.tensor(list(self.overlap.values()), dtype=torch.float64)
        return tuple(tuple(row) for row in stacked.mean(0).tolist())


@dataclass(frozen=True, kw_only=True)
class Experiences(PartActivity):
    """Activity of a run's final model on the test data of each experience.

    Attributes:
        forgetting: Forgetting of each experience; None for the last one and for an unfinished run.
    """

    forgetting: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.forgetting)


@dataclass(frozen=True, kw_only=True)
class Domains(PartActivity):
    """Activity of a language model on each of several text files.

    Attributes:
        names: Of the files.
    """

    names: tuple[str, ...]


def measure_experiences(target: Target, *, limit: int | None, size: int) -> Experiences | None:
    """Measure the neurons of a run's network on each experience; None for another target or one experience.

    Args:
        target: The target.
        limit: Samples of each experience, evenly spaced; None for all.
        size: Samples per batch.
    """
    if target.run is None or len(target.experiences) < 2:
        return None
    found = [
        activity(target.body, [with_mask(batch) for batch in part.batches(size=size, limit=limit)], value=ACTIVE)
        for part in target.experiences
    ]
    return Experiences(**_compared(found), forgetting=_forgetting(target))


def measure_domains(target: Target, *, limit: int | None, size: int) -> Domains | None:
    """Measure the neurons of a language model on each text file, as :func:`measure_experiences`; None for one file."""
    if not target.domains:
        return None
    found = [
        activity(
            target.model, [with_mask(batch) for batch in part.batches(size=size, limit=limit)], value=ACTIVE,
            predict=partial(run_body, target),
        )
        for part in target.domains.values()
    ]  # fmt: skip
    return Domains(names=tuple(target.domains), **_compared(found))


def run_body(target: Target, model: nn.Module, inputs: Inputs) -> object:
    """Run a model for its activations, a language model without its head."""
    if target.logits_at is None:
        return target.predict(model, inputs)
    assert isinstance(inputs, Mapping)
    return target.logits_at(model, inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool))


def _compared(found: Sequence[Activity]) -> dict[str, Any]:
    """Sparsity, its Gaussian baseline and overlaps of several activities of one model."""
    layers = list(found[0].active)
    widths = [len(rate_N) for rate_N in found[0].active.values()]
    gaussian = [baseline_sparsity(ACTIVE, kind="top_p", neurons=width) for width in widths]
    return {
        "sparsity": {layer: tuple(one.sparsity[layer] for one in found) for layer in layers},
        "gaussian": sum(gaussian) / len(gaussian),
        "overlap": {
            layer: tuple(tuple(row) for row in jaccard_EE.tolist()) for layer, jaccard_EE in overlap(found).items()
        },
    }


def _forgetting(target: Target) -> tuple[float | None, ...]:
    """Compute forgetting of each experience; None where the run is not finished."""
    if target.accuracy_matrix is None:
        return (None,) * len(target.experiences)
    lost = forgetting_E(target.accuracy_matrix)
    return tuple(None if score.undefined else score.value for score in lost)
