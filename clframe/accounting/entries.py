"""Rows of the ledger, and of the costs of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeVar, get_args

Phase = Literal["forward", "backward", "replay", "teachers", "auxiliary", "router", "evaluation"]
"""Purpose of multiply-adds.

``forward`` and ``backward``: the network on new samples. ``replay``: both on samples of a replay buffer, and their
selection. ``teachers``: components whose state holds frozen networks. ``router``: training of routers. ``auxiliary``:
other computations of components. ``evaluation``: accuracies on the test stream.
"""
PHASES: Final[tuple[str, ...]] = get_args(Phase)
Count = Literal["dense", "effective"]
"""Dense counts follow from shapes; effective counts leave out products with zeros."""
CONVENTION: Final = "macs: one multiply-add counts 1; FLOPs = 2 x MACs"
SCHEMA: Final = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Multiply-adds of one kind."""

    phase: Phase
    macs: int
    experience: int | None = None
    """From 0; None before the first experience and outside of a stream."""
    component: str = ""
    """Component that caused them; empty for the network and its task loss."""
    exit: str = ""
    """Exit at which the samples stopped; empty if they passed all exits."""
    samples: int = 0
    steps: int = 0
    """Optimizer steps."""
    effective_macs: int | None = None
    """Without products with zeros; None if they were not counted, which is read as ``macs``."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Wall time of one phase."""

    phase: str
    seconds: float
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes in use after an experience, or a peak."""

    kind: str
    """``parameters``, ``memory``, ``teachers``, ``components``, ``checkpoint``, ``process_peak`` or ``device_peak``."""
    bytes: int
    component: str = ""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Joules:
    """Energy as read from a hardware counter."""

    joules: float | None
    energy_source: str
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Number that a component declares in ``extra_cost``, under a name that it chooses."""

    name: str
    value: int
    component: str = ""
    experience: int | None = None


def as_rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return rows as mappings, in a tenth of the time of ``dataclasses.asdict``: long runs have thousands."""
    return [dict(vars(row)) for row in rows]


Row = TypeVar("Row")
_NUMBERS: Final = {"int": (int,), "float": (int, float), "str": (str,)}


def read_row(kind: type[Row], found: Mapping[str, Any]) -> Row:
    """Build a row from a mapping as read from a file; unknown fields, of later versions, are ignored.

    Raises:
        ValueError: A value does not have its field's type.
        TypeError: A field is missing.
    """
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]  # rows are dataclasses
        if field.name not in found:
            continue
        value, (wanted, _, rest) = found[field.name], str(field.type).partition(" | ")
        allowed = _NUMBERS.get(wanted, (str,))
        if not (isinstance(value, allowed) and not isinstance(value, bool)) and not (value is None and rest == "None"):
            raise ValueError(f"{field.name} is {value!r}")
        values[field.name] = value
    return kind(**values)


PartKind = Literal["stage", "head", "ensemble", "policy", "answers"]
"""Kinds of parts: a stage of the backbone; the head of an exit; the ensemble of exits; the confidence measure; the
correction of logits by a component, ``answers`` in ledger files since their first version."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a prediction; parts are in the order in which they run."""

    name: str
    kind: PartKind
    macs: int
    """Of one sample, with all experts on."""
    component: str = ""
    """Component that added it; empty for the backbone and its own classifier."""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Samples that stop at one exit."""

    exit: str
    macs: int
    """Of one sample up to this exit: all stages, heads and confidence measures before it included."""
    samples: int
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Products:
    """Multiply-adds of all layers with one role, over a few test samples."""

    role: str
    macs: int
    effective_macs: int
    """Without products with a zero input; for experts, those of the pairs that ran."""
    samples: int
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Use of one layer of experts, over a few test samples."""

    layer: str
    experts: int
    samples: int
    tokens: int
    routed: int
    """Tokens that the router scored."""
    pairs: int
    """(token, expert) pairs that ran; gathering and adding their rows counts no MACs."""
    expert_macs: int
    """Of one pair."""
    router_macs: int
    """Of one token."""
    part: str = ""
    """Name of the :class:`Part` with the layer."""
    experience: int | None = None

    @property
    def macs(self) -> int:
        """MACs of the pairs and of the router."""
        return self.pairs * self.expert_macs + self.routed * self.router_macs

    @property
    def dense_macs(self) -> int:
        """MACs of the same tokens with all experts and without a router."""
        return self.tokens * self.experts * self.expert_macs
