"""What is done to activations at a place: looked at, or masked and counted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from clframe.analysis.places import Place, tokens_of
from clframe.functional.sparsity import MaskKind, effective_rank, keep


class Seen:
    """Keeps the first tokens that count of a place, and changes nothing.

    Args:
        place: Where.
        limit: How many to keep.
    """

    def __init__(self, place: Place, *, limit: int) -> None:
        self.place, self.limit, self.tokens = place, limit, 0
        self.masks: Mapping[str, Tensor | None] = {}
        self._rows: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The same x."""
        for mask in self.masks.values():
            rows = tokens_of(x, mask, layer=self.place.layer)[: self.limit - self.tokens]
            self._rows.append(rows.float().cpu())
            self.tokens += len(rows)
        return x

    def silent(self, x: Tensor) -> Tensor:
        """The same x, not kept."""
        return x

    @cached_property
    def rows(self) -> Tensor:
        """x_TN, once all have been seen."""
        return torch.cat(self._rows)

    @property
    def neurons(self) -> int:
        """N."""
        return self.rows.shape[-1]

    @cached_property
    def scale(self) -> float:
        """Root mean square."""
        return float(self.rows.square().mean().sqrt())

    @cached_property
    def rank(self) -> float:
        """Effective rank."""
        return effective_rank(self.rows)


class Masking:
    """Masks a place token by token, and counts by the names of the masks of tokens what is zero afterwards.

    Args:
        place: Where.
        kind: See :func:`~clframe.functional.sparsity.keep`.
        value: p, the threshold or, of top-k, the share of neurons kept.
    """

    def __init__(self, place: Place, *, kind: MaskKind, value: float) -> None:
        self.place, self.kind, self.value = place, kind, value
        self.masks: Mapping[str, Tensor | None] = {}
        self._zeros_N: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """X masked."""
        masked = self.silent(x)
        for name, mask in self.masks.items():
            rows = tokens_of(masked, mask, layer=self.place.layer)
            zeros_N = (rows == 0).sum(0)
            self._zeros_N[name] = self._zeros_N[name] + zeros_N if name in self._zeros_N else zeros_N
            self._tokens[name] = self._tokens.get(name, 0) + len(rows)
        return masked

    def silent(self, x: Tensor) -> Tensor:
        """X masked, not counted."""
        value = round(self.value * x.shape[-1]) if self.kind == "top_k" else self.value
        return x * keep(x, value, kind=self.kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the masks of tokens met so far."""
        return tuple(self._tokens)

    @property
    def active_N(self) -> Tensor:
        """Share of tokens in which each neuron is not zero, all parts together."""
        zeros_N = torch.stack(list(self._zeros_N.values())).sum(0)
        return 1 - zeros_N.double().cpu() / max(sum(self._tokens.values()), 1)

    def sparsity(self, part: str | None = None) -> float:
        """Share of zeros in one part, or in all together; 0 where there are no tokens."""
        parts = self.parts if part is None else (part,)
        tokens = sum(self._tokens[name] for name in parts)
        zeros = sum(float(self._zeros_N[name].sum()) for name in parts)
        neurons = len(self._zeros_N[parts[0]]) if parts else 0
        return zeros / (tokens * neurons) if tokens * neurons else 0.0
