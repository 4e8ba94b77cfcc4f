"""A class that cannot be a component is refused when it is registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from clframe.core import COMPONENTS, Component, register
from clframe.errors import ConfigError


class Undecorated(Component):
    name = "undecorated"
    memory: int = 3


@dataclass(frozen=True, kw_only=True)
class Nameless(Component):
    memory: int = 3


@dataclass(frozen=True, kw_only=True)
class Right(Component):
    name: ClassVar[str] = "right_one"
    memory: int = 3


@pytest.mark.parametrize(
    "entry, message",
    [
        (Undecorated, r"^component 'undecorated': 'memory' of Undecorated is not an option; write @dataclass"),
        (Nameless, r"^component 'Nameless': Nameless has no name; write name: ClassVar"),
        (dict, r"^component 'dict': found <class 'dict'>; expected a subclass of Component$"),
    ],
)
def test_a_class_whose_options_would_be_ignored_is_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        register(entry)


def test_a_dataclass_is_registered(monkeypatch):
    monkeypatch.setattr(COMPONENTS, "_entries", dict(COMPONENTS._entries))
    assert register(Right) is Right and COMPONENTS.get("right_one") is Right
