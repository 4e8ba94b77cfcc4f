"""A class that cannot be a component is refused when it is registered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from clframe.core import COMPONENTS, Component, compose, register
from clframe.errors import ComposeError, ConfigError, UnknownNameError


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


@pytest.mark.parametrize("name", ["my-comp", "my comp", "a.b", "lambda", "1st", ""])
def test_a_name_that_no_expression_can_use_is_refused(name):
    kind = type("Own", (Component,), {"name": name, "__module__": __name__})
    expected = f"component '{name}': expressions cannot use this name; give letters, digits and underscores"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
        register(kind)
    with pytest.raises(UnknownNameError):
        COMPONENTS.get(name)


@pytest.mark.parametrize(
    "attribute, value, message",
    [
        ("slots", ["batch"], "slots is ['batch']; declare a set, such as slots = frozenset({'batch'})"),
        ("slots", "batch", "slots is 'batch'; declare a set, such as slots = frozenset({'batch'})"),
        ("terms", "distill", "terms is 'distill'; declare a tuple, such as terms = ('distill',)"),
        ("weight", "beta", "weight is 'beta', which is not an option; name one of its fields, or None"),
    ],
)
def test_a_class_attribute_of_another_kind_is_refused_when_registering_and_when_composing(attribute, value, message):
    kind = type("Own", (Component,), {"name": "own", attribute: value, "__module__": __name__})
    for error, use in ((ConfigError, lambda: register(kind)), (ComposeError, lambda: compose(kind()))):
        with pytest.raises(error, match=f"^component 'own': {re.escape(message)}$"):
            use()
