"""Neurons that at least one token of a batch activates: the part of a layer that a batch needs.

Shape suffixes: B samples, T tokens, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clframe.nn.frozen import call_model, evaluating
from clframe.nn.types import Inputs
from clframe.sparsity.functional import keep
from clframe.sparsity.masking import HookPoint, find_hook_points, replacing, select_tokens

PAYS = 0.1
"""Share of a layer's cost that must be saved for sparsity to pay; less is lost to choosing and gathering neurons."""


@dataclass(frozen=True, kw_only=True)
class ActiveUnion:
    """Expected share of neurons that random batches activate.

    Attributes:
        value: p of the top-p rule: a neuron is active in a token if the rule keeps it.
        sizes: Batch sizes: powers of 2.
        tokens: By layer, the share for batches of that many single tokens, as in decoding; sizes beyond the number of
            tokens are left out.
        samples: The same for batches of that many whole samples; empty where tokens have no sample.
    """

    value: float
    sizes: tuple[int, ...]
    tokens: Mapping[str, tuple[float, ...]]
    samples: Mapping[str, tuple[float, ...]]

    @property
    def mean_tokens(self) -> tuple[float, ...]:
        """Mean of ``tokens`` over layers."""
        return _means(self.tokens)

    @property
    def mean_samples(self) -> tuple[float, ...]:
        """Mean of ``samples`` over layers."""
        return _means(self.samples)

    def largest_that_pays(self, shares: tuple[float, ...], *, least: float = PAYS) -> int | None:
        """Largest batch size at which at least ``least`` of the neurons are inactive in all tokens; None if none is.

        >>> union = ActiveUnion(value=0.99, sizes=(1, 2, 4), tokens={"ffn": (0.5, 0.9, 0.95)}, samples={})
        >>> union.largest_that_pays(union.mean_tokens)
        2
        """
        # Rounded, because 1 - 0.9 is less than 0.1.
        paying = [size for size, share in zip(self.sizes, shares, strict=False) if round(1 - share, 9) >= least]
        return max(paying, default=None)


def expected_union(count_N: Tensor, total: int, size: int) -> float:
    """Expected share of neurons that are active in at least one of ``size`` different units out of ``total``.

    A neuron that is active in c of T units is inactive in all b drawn ones with probability C(T - c, b) / C(T, b).

    Args:
        count_N: Number of units in which each neuron is active.
        total: T.
        size: b, at most T.

    >>> expected_union(torch.tensor([2, 0]), 4, 2)  # one of two neurons, in 5 of the 6 pairs
    0.41666...
    """
    rest_N = total - count_N.double()
    whole = torch.tensor(float(total), dtype=torch.float64)
    log_N = torch.lgamma(rest_N + 1) - torch.lgamma((rest_N - size).clamp(min=0) + 1)
    log_N = log_N - torch.lgamma(whole + 1) + torch.lgamma(whole - size + 1)
    missed_N = log_N.exp().masked_fill(rest_N < size, 0)
    return 1 - float(missed_N.mean())


def measure_union(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Any, Tensor | Mapping[str, Tensor] | None]],
    *,
    value: float = 0.99,
    power: float = 1.0,
    inside: nn.Module | None = None,
    predict: Callable[[nn.Module, Inputs], Any] = call_model,
) -> ActiveUnion:
    """Count active neurons of the unmasked model by token and by sample, in one pass.

    Args:
        model: Module with feed-forward networks, or with activations.
        batches: As for :func:`~clframe.sparsity.analysis.analyze`; several masks count together.
        value: p of the top-p rule.
        power: Of magnitudes in it.
        inside: Submodule to search; None searches the model.
        predict: Runs the model on the inputs of a batch.

    Raises:
        UnsupportedError: A model without either.
    """
    points = [one for one in find_hook_points(model if inside is None else inside) if one.role == "intermediate"]
    counters = [_Counter(point, value, power) for point in points]
    with evaluating(model), replacing([(one.point, one) for one in counters]):
        for inputs, _, mask in batches:
            first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
            for one in counters:
                one.batch = len(first)
                one.mask = torch.stack(list(mask.values())).any(0) if isinstance(mask, Mapping) else mask
            predict(model, inputs)
    counters = [one for one in counters if one.tokens]
    most = max((max(one.tokens, one.samples) for one in counters), default=0)
    sizes = tuple(2**n for n in range(most.bit_length()))
    return ActiveUnion(
        value=value, sizes=sizes, tokens={one.point.layer: one.curve(sizes, by_sample=False) for one in counters},
        samples={one.point.layer: one.curve(sizes, by_sample=True) for one in counters if one.samples},
    )  # fmt: skip


class _Counter:
    """Counts tokens and samples in which each neuron of a hook point is active; returns x unchanged."""

    def __init__(self, point: HookPoint, value: float, power: float) -> None:
        self.point, self.value, self.power = point, value, power
        self.batch = self.tokens = self.samples = 0
        self.mask: Tensor | None = None
        self._token_N: Any = 0
        self._sample_N: Any = 0

    def __call__(self, x: Tensor) -> Tensor:
        active_TN = keep(x.reshape(-1, x.shape[-1]), self.value, kind="top_p", power=self.power)
        rows_TN = select_tokens(active_TN, None if self.mask is None else self.mask.reshape(-1), layer=self.point.layer)
        self._token_N = self._token_N + rows_TN.sum(0).cpu()
        self.tokens += len(rows_TN)
        # Tokens of a sample are neighbors, also where a layer flattens its input.
        if self.batch and len(active_TN) % self.batch == 0:
            kept_TN = active_TN if self.mask is None else active_TN & self.mask.reshape(-1, 1).to(active_TN.device)
            self._sample_N = self._sample_N + kept_TN.unflatten(0, (self.batch, -1)).any(1).sum(0).cpu()
            self.samples += self.batch
        return x

    def curve(self, sizes: tuple[int, ...], *, by_sample: bool) -> tuple[float, ...]:
        """Expected share at each batch size up to the number of units."""
        count_N, total = (self._sample_N, self.samples) if by_sample else (self._token_N, self.tokens)
        return tuple(expected_union(count_N, total, size) for size in sizes if size <= total)


def _means(shares: Mapping[str, tuple[float, ...]]) -> tuple[float, ...]:
    rows = list(shares.values())
    # Layers that run more than once per sample have more tokens, and longer curves.
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=False))
