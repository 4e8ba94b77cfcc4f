"""Options of components that are built in Python: checked and converted as those of an expression are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_origin

import numpy as np
import pytest

from clframe import parse
from clframe.core import Component
from clframe.core.expression import COMPONENTS
from clframe.errors import ConfigError
from clframe.options import REQUIRED, option_types

NAMES = sorted(COMPONENTS.names())


def needed(component: type[Component]) -> dict[str, Any]:
    """Values of the options without a default."""
    options = option_types(component).items()
    return {name: () if get_origin(kind) is tuple else 1 for name, (kind, default) in options if default is REQUIRED}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_component_is_checked(name: str) -> None:
    component = COMPONENTS.get(name)
    for option, (kind, _) in option_types(component).items():
        for wrong in ({1}, "no such word") if get_origin(kind) is Literal or kind in (int, float, bool) else ({1},):
            with pytest.raises(ConfigError, match=rf"^components\.{name}\.{option}: found ") as found:
                component(**{**needed(component), option: wrong})
            assert "\n" not in str(found.value)


@dataclass(frozen=True, kw_only=True)
class Checked(Component):
    """A component with a check that does not call that of its base."""

    name: ClassVar[str] = "checked"

    rate: float = 1.0
    size: int = 3
    taps: tuple[str, ...] = ()
    mode: Literal["one", "two"] | int = "one"
    given: Any = None
    calls: ClassVar[list[float]] = []

    def __post_init__(self) -> None:
        """Note a value, which has been checked and converted."""
        self.calls.append(self.rate)


@dataclass(frozen=True, kw_only=True)
class Further(Checked):
    """One whose check calls that of its base."""

    name: ClassVar[str] = "further"

    def __post_init__(self) -> None:
        """Call that of the base."""
        super().__post_init__()
        assert isinstance(self.rate, float)


def test_own_checks_of_a_component_find_checked_options() -> None:
    Checked.calls.clear()
    with pytest.raises(ConfigError, match=r"^components\.checked\.rate: found 'x' \(text\); give a number$"):
        Checked(rate="x")
    with pytest.raises(ConfigError, match=r"^components\.further\.size: found 2\.5; give a whole number$"):
        Further(size=2.5)
    assert Checked.calls == []
    Further(rate=2)
    assert Checked.calls == [2.0] and type(Checked.calls[0]) is float


def test_two_wrong_options_are_two_lines() -> None:
    with pytest.raises(ConfigError) as found:
        Checked(rate="x", mode="three")
    assert str(found.value).splitlines() == [
        "components.checked.rate: found 'x' (text); give a number",
        "components.checked.mode: found 'three' (text); give one of one, two or a whole number",
    ]


def test_values_are_stored_as_an_expression_stores_them() -> None:
    made = Checked(rate=np.float32(0.5), size=np.int64(4), taps=["a"], given=[1])
    assert (made.rate, made.size, made.taps, made.given) == (0.5, 4, ("a",), [1])
    assert [type(value) for value in (made.rate, made.size, made.taps)] == [float, int, tuple]
    assert COMPONENTS.get("lwf")(alpha=2) == parse("lwf(alpha=2)").components[0]


def test_annotations_that_only_a_function_knows_are_not_checked() -> None:
    class Local:
        pass

    @dataclass(frozen=True, kw_only=True)
    class Inside(Component):
        name: ClassVar[str] = "inside"
        value: Local | None = None
        table: Mapping[str, int] | None = None

    assert Inside(value=Local()).table is None
