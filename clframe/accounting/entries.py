"""The rows of a ledger."""

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
