"""Records of hidden neurons and experts after an experience.

Shape suffixes: N neurons, E experiences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from clframe.data.benchmark import Benchmark
from clframe.moe import Usage, count_usage
from clframe.moe.usage import active_rates, overlaps
from clframe.nn.backbones.from_transformers import token_mask
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.sparsity.activity import ActivityRecord, ExpertActivity, LayerActivity

NEURON_PROBES = 256
"""Most samples of an experience on which neurons are recorded."""
MOST_PROBES = 2048
"""Most samples of all experiences of a stream together, which bounds the cost of long streams."""
BATCH = 32
"""Samples per batch; small, because the hidden layers of a transformer need most of the memory."""
DIGITS = 4


class ActivityRecorder:
    """Computes an :class:`~clframe.sparsity.activity.ActivityRecord` after each training experience.

    Args:
        benchmark: The stream.

    Attributes:
        learnt: For each experience, rate_N by layer right after learning it; part of every checkpoint.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self.learnt: list[Mapping[str, Tensor]] = []

    def record(self, network: Network, index: int) -> ActivityRecord:
        """Return the record after experience ``index`` and store its rates as those when it was learned.

        The network, its modes and random states stay as they are.
        """
        samples_E, rates, usage = [], [], []
        with preserving_state([network]):
            for samples in self._benchmark.evaluation[: index + 1]:
                at = probe_indices(len(samples), experiences=len(self._benchmark))
                batches = (_prepare(network, samples, part) for part in at.split(BATCH) if len(part))
                with count_usage(network) as used:
                    found = active_rates(
                        network.backbone, batches, call=network, mask=partial(token_mask, network.backbone)
                    )
                    usage.append(used())
                rates.append({layer: rate_N.float() for layer, rate_N in found.items()})
                samples_E.append(len(at))
        self.learnt = [*self.learnt[:index], *[{}] * (index - len(self.learnt)), rates[index]]
        layers = dict.fromkeys(layer for found in rates for layer in found)
        return ActivityRecord(
            samples_E=tuple(samples_E),
            layers={layer: self._layer([found.get(layer) for found in rates], layer) for layer in layers},
            experts={layer: _experts([used[layer] for used in usage]) for layer in usage[index]},
        )

    def _layer(self, rates: Sequence[Tensor | None], layer: str) -> LayerActivity:
        """``rates`` are those of each experience; None where it has no samples."""
        known = next(rate_N for rate_N in rates if rate_N is not None)
        now_EN = torch.stack([torch.full_like(known, torch.nan) if rate_N is None else rate_N for rate_N in rates])
        sparsity_E = 1 - now_EN.double().mean(1)
        return LayerActivity(
            neurons=len(known),
            sparsity=_round(float(sparsity_E.nanmean())),
            sparsity_E=tuple(map(_round, sparsity_E.tolist())),
            overlap_E=tuple(map(_round, overlaps(now_EN)[-1].tolist())),
            kept_E=tuple(_kept(learnt.get(layer), now_N) for learnt, now_N in zip(self.learnt, now_EN, strict=True)),
        )


def probe_indices(samples: int, *, experiences: int) -> Tensor:
    """Indices of an experience's samples to record: evenly spaced, since samples are often sorted by class.

    >>> probe_indices(10, experiences=2048).tolist(), probe_indices(3, experiences=5).tolist()
    ([0], [0, 1, 2])
    """
    count = min(samples, NEURON_PROBES, max(1, MOST_PROBES // experiences))
    return torch.arange(count) * samples // max(count, 1)


def _prepare(network: Network, samples: Samples, index: Tensor) -> Tensor:
    return network.to_device(samples.prepare(samples.raw(index)))


def _kept(learnt_N: Tensor | None, now_N: Tensor) -> float:
    if learnt_N is None or len(learnt_N) != len(now_N):
        return float("nan")
    return _round(float(overlaps(torch.stack([learnt_N.to(now_N), now_N]))[0, 1]))


def _experts(usage: Sequence[Usage]) -> ExpertActivity:
    per_token_E = [one.experts_per_token for one in usage]
    ran_E = torch.tensor([one.ran_E for one in usage]).sum(0)
    return ExpertActivity(
        experts=usage[-1].macs.experts,
        per_token=_round(_mean(per_token_E)),
        per_token_E=tuple(map(_round, per_token_E)),
        unused=int((ran_E == 0).sum()),
        macs_share=_round(_mean([one.share for one in usage])),
    )


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


def _round(value: float) -> float:
    return round(value, DIGITS)
