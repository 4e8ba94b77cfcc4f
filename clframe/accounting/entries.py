"""Rows of the ledger and of its account of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeVar, get_args

Phase = Literal["forward", "backward", "replay", "teachers", "auxiliary", "router", "evaluation"]
"""Where multiply-adds go.

``forward`` and ``backward`` are the network's own on new data; ``replay`` is both on samples from a memory, and the
choice of them; ``teachers`` are frozen networks asked in a step; ``router`` is the training of routers; ``auxiliary``
is what else components run.
"""
PHASES: Final[tuple[str, ...]] = get_args(Phase)
Count = Literal["dense", "effective"]
"""Dense counts follow shapes; effective ones leave out products with zeros."""
CONVENTION: Final = "macs: one multiply-add counts 1; FLOPs = 2 x MACs"
SCHEMA: Final = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Multiply-adds of one kind."""

    phase: Phase
    macs: int
    experience: int | None = None
    """Counted from 0; None before the first and outside of a stream."""
    component: str = ""
    """Whose doing it is; empty for the network and its task."""
    exit: str = ""
    """The exit up to which samples went; empty where they pass all of them."""
    samples: int = 0
    steps: int = 0
    """Optimizer steps."""
    effective_macs: int | None = None
    """Without products with zeros; None where nobody counted them, which then is ``macs``."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Wall time of one phase."""

    phase: str
    seconds: float
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes kept at one moment."""

    kind: str
    """``parameters``, ``memory``, ``teachers``, ``components``, ``checkpoint``, ``process_peak`` or ``device_peak``."""
    bytes: int
    component: str = ""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Joules:
    """Energy by a real counter."""

    joules: float | None
    energy_source: str
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A count that a component declares, under a name of its own."""

    name: str
    value: int
    component: str = ""
    experience: int | None = None


Row = TypeVar("Row")
_NUMBERS: Final = {"int": (int,), "float": (int, float), "str": (str,)}


def read_row(kind: type[Row], found: Mapping[str, Any]) -> Row:
    """A row as a file has it; fields that this version does not know are left out.

    Raises:
        ValueError: A value of another type than its field's.
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
"""Of what a part is: a stage of the backbone; the classifier of an exit; what joins the exits; the confidence by which
a sample may stop; what a component does to the answers of all exits."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a prediction, in the order in which they run."""

    name: str
    kind: PartKind
    macs: int
    """Of one sample, all experts run."""
    component: str = ""
    """Whose it is; empty for the backbone and its own classifier."""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Samples that go no further than one exit."""

    exit: str
    macs: int
    """Of one sample up to there: stages, heads and policy passed on the way included."""
    samples: int
    of: int | None = None
    """The test experience they are from."""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Products:
    """Multiply-adds of all layers in one role, over a few real samples."""

    role: str
    macs: int
    effective_macs: int
    """Without products of a zero among the layer's inputs; of experts, those of the pairs that ran."""
    samples: int
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What one layer of experts did, over a few real samples."""

    layer: str
    experts: int
    samples: int
    tokens: int
    routed: int
    """Tokens that the router was asked for."""
    pairs: int
    """(token, expert) pairs that ran; each is gathered and added back once, which counts no MACs."""
    expert_macs: int
    """Of one pair."""
    router_macs: int
    """Of one token."""
    part: str = ""
    """Name of the part that the layer is in."""
    experience: int | None = None

    @property
    def macs(self) -> int:
        """All that was computed: pairs, and the router."""
        return self.pairs * self.expert_macs + self.routed * self.router_macs

    @property
    def dense_macs(self) -> int:
        """Of the same tokens, with all experts and without a router."""
        return self.tokens * self.experts * self.expert_macs
