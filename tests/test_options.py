"""Options against annotations: what is converted, what is refused, and in which words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

import pytest

from clframe.errors import ConfigError
from clframe.options import REQUIRED, check_options, convert, format_value, missing_options, option_types


def same(value, expected):
    return value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (3, int, 3),
        (-(2**63), int, -(2**63)),
        (3, float, 3.0),
        (2.5, float, 2.5),
        (False, bool, False),
        ("x", str, "x"),
        ("", str, ""),
        ("a/b", Path, Path("a/b")),
        (Path("a/b"), Path | None, Path("a/b")),
        ({"a": 1}, Any, {"a": 1}),
        (None, Any, None),
        ("b", Literal["a", "b"], "b"),
        (2, Literal[1, 2], 2),
        (None, Optional[int], None),  # noqa: UP045 - the older spelling is another object
        (None, float | None, None),
        (4, float | None, 4.0),
        ("x", Union[int, str], "x"),  # noqa: UP007 - as above
        ([1, 2], tuple[int, ...], (1, 2)),
        ([], tuple[int, ...], ()),
        ((1, 2), list[int], [1, 2]),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], Sequence[float], (1.0, 2.0)),
        ([3, "x"], tuple[int, str], (3, "x")),
        ([1, "x"], tuple, (1, "x")),
        ([[1], []], tuple[tuple[int, ...], ...], ((1,), ())),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": [1]}, Mapping[str, tuple[int, ...]], {"a": (1,)}),
        ({"a": 1}, dict, {"a": 1}),
        ([1], int | tuple[int, ...], (1,)),
        (1, int | tuple[int, ...], 1),
        ("seeded", Literal["seeded"] | tuple[int, ...], "seeded"),
    ],
)  # fmt: skip
def test_values_that_fit(value, annotation, expected):
    converted = convert(value, annotation, where="x")
    assert same(converted, expected)
    if isinstance(expected, (tuple, list)):
        assert all(same(one, other) for one, other in zip(converted, expected, strict=True))


@pytest.mark.parametrize(
    "value, annotation, message",
    [
        ("3", int, "x: found '3' (text); give a whole number"),
        (3.0, int, "x: found 3.0; give a whole number"),
        (True, int, "x: found true; give a whole number"),
        (None, int, "x: found null; give a whole number"),
        (2**63, int, "x: found 9223372036854775808; give a number that fits 64 bits"),
        (True, float, "x: found true; give a number"),
        ("1.5", float, "x: found '1.5' (text); give a number"),
        (math.nan, float, "x: found nan; give a finite number"),
        (-math.inf, float, "x: found -inf; give a finite number"),
        (math.inf, float | None, "x: found inf; give a finite number"),
        ("x", float | None, "x: found 'x' (text); give a number or null"),
        (1, bool, "x: found 1; give true or false"),
        ("yes", bool, "x: found 'yes' (text); give true or false"),
        (3, str, "x: found 3; give text, in quotes"),
        (False, str, "x: found false; give text, in quotes"),
        (None, str, "x: found null; give text"),
        (["a"], str, "x: found ['a'] (a list); give text"),
        (3, Path, "x: found 3; give a path"),
        ("c", Literal["a", "b"], "x: found 'c' (text); give one of them (known: a, b)"),
        ("conts", Literal["const", "ramp"], "x: found 'conts' (text); did you mean 'const'? (known: const, ramp)"),
        (True, Literal[1, 2], "x: found true; give one of them (known: 1, 2)"),
        ([1], Literal["a"], "x: found [1] (a list); give one of them (known: a)"),
        (3, tuple[int, ...], "x: found 3; give a list"),
        ("ab", tuple[str, ...], "x: found 'ab' (text); give a list"),
        ({"a": 1}, list[int], "x: found {'a': 1} (a mapping); give a list"),
        ([1, "b"], tuple[int, ...], "x[1]: found 'b' (text); give a whole number"),
        ([[1], [2.5]], tuple[tuple[int, ...], ...], "x[1][0]: found 2.5; give a whole number"),
        ([1, 2, 3], tuple[int, int], "x: found [1, 2, 3] (a list); give a list of 2"),
        ([1, "b"], Literal["all"] | tuple[int, ...], "x[1]: found 'b' (text); give a whole number"),
        ("al", Literal["all"] | tuple[int, ...], "x: found 'al' (text); did you mean 'all'? give one of all or a list"),
        ([1], int | None, "x: found [1] (a list); give a whole number or null"),
        ([1], dict[str, int], "x: found [1] (a list); give a mapping"),
        ({"a": "b"}, dict[str, int], "x.a: found 'b' (text); give a whole number"),
        ({"a": "b"}, int | dict[str, int], "x.a: found 'b' (text); give a whole number"),
        ("x", complex, "x: found 'x' (text); give complex"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(value, annotation, message):
    with pytest.raises(ConfigError) as error:
        convert(value, annotation, where="x")
    assert str(error.value) == message


def test_a_huge_whole_number_is_no_float():
    with pytest.raises(ConfigError, match=r"^x: found 1000+ \.\.\. 00000; give a finite number$"):
        convert(10**400, float, where="x")


@dataclass(frozen=True, kw_only=True)
class Options:
    name: ClassVar[str] = "options"
    path: str
    width: int = 8
    rates: tuple[float, ...] = field(default_factory=lambda: (0.5,))
    computed: int = field(init=False, default=0)


def factory(shape, *, path: str, width: int = 8, rates: tuple[float, ...] = (0.5,)):
    return shape, path, width, rates


@pytest.mark.parametrize("taker", [Options, factory])
def test_options_of_dataclasses_and_functions(taker):
    assert option_types(taker) == {
        "path": (str, REQUIRED),
        "width": (int, 8),
        "rates": (tuple[float, ...], (0.5,)),
    }
    given = {"path": "p", "rates": [1]}
    assert check_options(taker, given, where="w") == {"path": "p", "rates": (1.0,)}
    assert given == {"path": "p", "rates": [1]}  # left as it was


@pytest.mark.parametrize("taker", [Options, factory])
def test_what_is_wrong_is_named(taker):
    for given, message in (
        ({"widht": 3}, "w.widht: unknown option; did you mean 'width'?"),
        ({"zzz": 3}, "w.zzz: unknown option; options are path, width, rates"),
        ({3: 3}, "w.3: unknown option; options are path, width, rates"),
        ({"shape": 3}, "w.shape: unknown option; options are path, width, rates"),
        ({"computed": 3}, "w.computed: unknown option; options are path, width, rates"),
        ({"width": "8"}, "w.width: found '8' (text); give a whole number"),
        ({"rates": [1, None]}, "w.rates[1]: found null; give a number"),
        ({"width": 3}, "w.path: is missing and has no default; give text"),
        ({}, "w.path: is missing and has no default; give text"),
    ):
        with pytest.raises(ConfigError) as error:
            check_options(taker, given, where="w")
        assert str(error.value) == message


def test_what_is_missing_may_come_later():
    assert check_options(factory, {"width": 3}, where="w", complete=False) == {"width": 3}
    assert missing_options(factory, {"width": 3}) == ("path",)
    assert missing_options(factory, {"path": "x"}) == ()


def test_keys_of_the_block_are_offered_too():
    with pytest.raises(ConfigError, match=r"^benchmark\.experience: unknown option; did you mean 'experiences'\?$"):
        check_options(factory, {"experience": 3}, where="benchmark", block_keys=("experiences", "name"))


def test_nothing_to_set():
    with pytest.raises(ConfigError, match=r"^w\.x: unknown option; options are none$"):
        check_options(lambda: None, {"x": 1}, where="w")


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"),
        (True, "true"),
        (0, "0"),
        (0.1, "0.1"),
        ("a\nb", "'a\\nb' (text)"),
        ((1,), "[1] (a list)"),
        ({}, "{} (a mapping)"),
        (b"x", "b'x'"),
    ],
)
def test_values_as_messages_show_them(value, text):
    assert format_value(value) == text


def test_long_values_are_shortened_in_the_middle():
    text = format_value("a" * 200 + "xyz", limit=30)
    assert text == "'" + "a" * 19 + " ... axyz' (text)"
    assert "\n" not in format_value("\n" * 500)
