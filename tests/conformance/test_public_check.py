"""The check of components that other packages use in their tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conformance_runs import NAMES, NEEDS_TOKENS

from clframe.core import Component
from clframe.errors import ClframeError, ConfigError
from clframe.testing import check_component


@pytest.mark.parametrize("name", NAMES)
def test_every_component_passes(name):
    check_component(name, transformer=name in NEEDS_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Own(Component):
    """Own: a component with an option.

    Args:
        strength: Weight of its term.
    """

    name: ClassVar[str] = "own"
    terms: ClassVar[tuple[str, ...]] = ("square",)
    weight: ClassVar[str] = "strength"

    strength: float = 0.1

    def losses(self, step, state):
        return {"square": self.strength * sum(p.square().sum() for p in step.network.parameters())}


class Unchecked(Own):
    pass


@dataclass(frozen=True, kw_only=True)
class Undocumented(Own):
    """Undocumented."""

    more: int = 3


@dataclass(frozen=True, kw_only=True)
class Renamed(Own):
    """Own with an argument of another name. strength: as before."""

    def losses(self, batch, state):
        return {}


@dataclass(frozen=True, kw_only=True)
class Logs(Own):
    """Own that logs another term. strength: as before."""

    def losses(self, step, state):
        return {"square": torch.zeros(()), "cube": torch.zeros(())}


@dataclass(frozen=True, kw_only=True)
class Diverges(Own):
    """Own that divides by zero at the end. strength: as before."""

    def after_experience(self, network, context, state):
        if context.experience.index == 2:
            with torch.no_grad():
                next(network.parameters()).div_(0)
        return state


@dataclass(frozen=True, kw_only=True)
class Remembers(Own):
    """Own with something outside its state. strength: as before."""

    calls: ClassVar[list[int]] = []

    def losses(self, step, state):
        self.calls.append(1)
        return {"square": len(self.calls) * next(step.network.parameters()).square().sum()}


@dataclass(frozen=True, kw_only=True)
class KeepsSets(Own):
    """Own with a set in its state. strength: as before."""

    def after_experience(self, network, context, state):
        return {"seen": {1, 2}}


@dataclass(frozen=True, kw_only=True)
class Strict(Own):
    """Own that refuses the weight 0. strength: as before."""

    def __post_init__(self):
        if self.strength <= 0:
            raise ConfigError("components.own.strength: found 0")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Unchecked, "component 'own': it is not a frozen dataclass"),
        (Undocumented, "component 'own': option strength is not documented"),
        (Renamed, r"component 'own': losses has the parameters \(self, batch, state\); give it \(self, step, state\)"),
        (Logs, r"'own'.*cube"),
        (Diverges, "component 'own': it trained .* to weights that are not finite"),
        (Remembers, "component 'own': equal seeds gave other weights"),
        (KeepsSets, "state holds a set"),
        (Strict, r"component 'own': strength=0, which leaves it out, is refused \(components.own.strength: found 0\)"),
    ],
)
def test_a_rule_that_is_broken_is_named(kind, problem):
    with pytest.raises(ClframeError, match=problem):
        check_component(kind)


def test_the_example_of_another_package_passes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "third_party")
    from clframe_anchor import Anchor

    check_component(Anchor)
    check_component(Anchor, strength=1.0)


def test_options_are_given_by_name():
    check_component(Own, strength=0.2)
    with pytest.raises(TypeError, match="unknown"):
        check_component(Own, unknown=1)
