"""Rules for the neurons that decoding skips, by place in a feed-forward network, and the weights that are then read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.sparsity.functional import MaskKind, keep, require_value

Place = Literal["input", "gate", "up", "intermediate"]
PLACES: Final[tuple[Place, ...]] = ("input", "gate", "up", "intermediate")
"""Places of activations, as in the analysis: :data:`~clframe.sparsity.masking.ROLES`."""
BOTH: Final = "all"
"""Name of the places ``input`` and ``intermediate`` together."""
FACTORS: Final[tuple[Place, ...]] = ("gate", "up")
"""The factors of a gated network; where one is 0, neither the other nor the column of the last layer is needed."""


def expand_places(names: Iterable[str], *, where: str) -> dict[str, tuple[Place, ...]]:
    """Return the places of each name; ``all`` is the input and the intermediate activations.

    Raises:
        ConfigError: No names.
        UnknownNameError: An unknown name.

    >>> expand_places(["gate", "all"], where="mine")
    {'gate': ('gate',), 'all': ('input', 'intermediate')}
    """
    known: dict[str, tuple[Place, ...]] = {**{place: (place,) for place in PLACES}, BOTH: ("input", "intermediate")}
    wanted = tuple(names)
    if not wanted:
        raise ConfigError(f"{where}: found no place; give some of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise UnknownNameError(unknown_name("place", name, list(known), where=where))
    return {name: known[name] for name in dict.fromkeys(wanted)}


@dataclass(frozen=True)
class Rule:
    """A rule that keeps the largest entries of each token; the others count as 0.

    Attributes:
        kind: See :func:`~clframe.sparsity.functional.keep`. Only a ``threshold`` is fused into the CUDA kernels; the
            others need a maximum or a sort of the entries.
        value: p, the threshold or, for ``top_k``, the share of entries to keep, as in the analysis.

    Raises:
        ConfigError: A value out of range.
    """

    kind: MaskKind
    value: float

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.kind == "top_k" and not 0 <= self.value <= 1:
            raise ConfigError(f"sparsity.top_k: found {self.value}; give a share of the entries between 0 and 1")
        require_value(0 if self.kind == "top_k" else self.value, kind=self.kind)

    def apply(self, x_TN: Tensor) -> Tensor:
        """Return x with 0 for the entries that are not kept.

        >>> import torch
        >>> Rule("threshold", 2).apply(torch.tensor([[1.0, -3.0, 2.0]]))
        tensor([[ 0., -3.,  2.]])
        """
        value = round(self.value * x_TN.shape[-1]) if self.kind == "top_k" else self.value
        return x_TN * keep(x_TN, value, kind=self.kind)


Rules = Mapping[Place, Rule]
"""One rule for the input, one for gate, up or intermediate, or both."""


def require_rules(rules: Collection[str], *, gated: bool, where: str) -> None:
    """Raise an error for places that a network does not have, or that cannot be combined.

    Raises:
        UnknownNameError: No place of this name.
        ConfigError: No place, a factor of a network without gate, or more than one of gate, up and intermediate.
    """
    for place in rules:
        if place not in PLACES:
            raise UnknownNameError(unknown_name("place", place, PLACES, where="sparse_decode.rules"))
        if place in FACTORS and not gated:
            raise ConfigError(f"sparse_decode.rules: found {place} for {where}, which has no gate; use intermediate")
    hidden = [place for place in rules if place != "input"]
    if not rules or len(hidden) > 1:
        found = " and ".join(hidden) or "none"
        raise ConfigError(f"sparse_decode.rules: found {found}; give input, one of gate, up and intermediate, or both")


def read_share(sparsity: Mapping[str, float], *, gated: bool) -> float:
    """Share of the weights of a feed-forward network that one token reads, for a sparsity by place.

    Of a gated network up, gate and down are a third each. Zeros of the input skip columns of up and gate; zeros of a
    factor rows of the other one and columns of down; those of the intermediate activation columns of down only. The
    time of a token is bounded below by this share of the time in which memory can deliver all weights.

    >>> read_share({"intermediate": 0.75}, gated=True), read_share({"intermediate": 0.75}, gated=False)
    (0.75, 0.625)
    >>> read_share({"input": 0.5}, gated=True), read_share({"gate": 0.75}, gated=True)
    (0.666..., 0.5)
    """
    of_input = 1 - sparsity.get("input", 0.0)
    factor = next((sparsity[place] for place in FACTORS if place in sparsity), None)
    of_hidden = 1 - (sparsity.get("intermediate", 0.0) if factor is None else factor)
    if not gated:
        return (of_input + of_hidden) / 2
    second = of_input if factor is None else of_hidden
    return (of_input + second + of_hidden) / 3
