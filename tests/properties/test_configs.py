"""Any mutation of a valid config trains two steps or ends with exit code 2 and one line that says what to do.

The default suite tries a few examples of each kind, always the same ones; ``-m slow`` tries 2,000.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import string
import tempfile
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install clframe[dev]")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clframe.cli import main
from clframe.config.load import load_config
from clframe.config.schema import OPEN_BLOCKS, Config
from clframe.core import COMPONENTS
from clframe.data import SOURCES
from clframe.errors import ClframeError
from clframe.nn import BACKBONES
from clframe.options import option_types

BASE = """
defaults: [experiment/quickstart]
backbone: {name: mlp, width: 8}
benchmark: {classes: 4, experiences: 2}
trainer: {fast_dev_run: 2, loggers: [], progress: false}
"""

COMPONENTS_TRIED = ("er", "lwf", "exits", "early_exit", "ewc", "der", "label_smoothing", "sparsity", "bic")
"""The mutations of options are of these components; expressions are made of all."""

FIXED = {"output", "trainer.fast_dev_run", "trainer.progress", "trainer.callbacks", "trainer.compile", "components"}
"""Not mutated: a folder anywhere on the machine, and what would make a run long or is not one value."""

JUNK: tuple[Any, ...] = (None, True, "x", "", [], [1], {}, {"a": 1}, -1, 0, 0.5, "1.5", "${seed}", "null")
NUMBERS = (-1.0, 0.0, 1e-45, 1e-6, 0.1, 0.5, 1.0, 2.0, 1e30, float("nan"), float("inf"))
WHOLE = (-1, 0, 1, 2, 3, 4, 5, 7, 300)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, most of them allowed, and values of other types."""
    return st.one_of(typed(hint), typed(hint), typed(hint), st.sampled_from(JUNK))


def typed(hint: Any) -> st.SearchStrategy[Any]:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inside)
    if origin is Union or type(hint).__name__ == "UnionType":
        return st.one_of(*map(typed, inside))
    if origin is tuple:
        return st.lists(typed(inside[0]), max_size=3)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.sampled_from(WHOLE),
        float: st.sampled_from(NUMBERS),
        str: st.text(st.sampled_from(string.printable + "é\u202e"), max_size=8),
        type(None): st.none(),
    }
    return simple.get(hint, st.sampled_from(JUNK))


def keys() -> dict[str, Any]:
    """The type of each value that a config has, by its key."""
    found: dict[str, Any] = {}

    def collect(kind: Any, path: str) -> None:
        for name, hint in get_type_hints(kind).items():
            key = f"{path}{name}"
            if dataclasses.is_dataclass(hint):
                collect(hint, f"{key}.")
            elif name != "options" and key not in FIXED:
                found[key] = hint

    collect(Config, "")
    makers = [("benchmark", SOURCES.get("digits")), ("backbone", BACKBONES.get("mlp"))]
    makers += [(f"components.{name}", COMPONENTS.get(name)) for name in COMPONENTS_TRIED]
    found |= {f"{where}.{name}": hint for where, maker in makers for name, (hint, _) in option_types(maker).items()}
    del found["strategy"]  # has its own test
    return found


KEYS = keys()


def spelled(value: Any) -> str:
    """The value as an override has it, which is YAML."""
    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(sorted(KEYS)))
    value = spelled(draw(values(KEYS[key])))
    if draw(st.integers(0, 19)) == 0:  # a slip of the pen
        at = draw(st.integers(0, len(key) - 1))
        key = key[:at] + key[at + 1 :]
    return f"{key}={value}"


@st.composite
def terms(draw: st.DrawFn) -> str:
    """One component, with options or without."""
    name = draw(st.sampled_from(COMPONENTS.names()))
    known = option_types(COMPONENTS.get(name))
    chosen = draw(st.lists(st.sampled_from(sorted(known)), max_size=2, unique=True)) if known else []
    given = ", ".join(f"{option}={draw(values(known[option][0]))!r}" for option in chosen)
    return f"{name}({given})" if given else name


@st.composite
def expressions(draw: st.DrawFn) -> str:
    text = " + ".join(draw(st.lists(terms(), min_size=1, max_size=3)))
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.sampled_from(["", "+", "(", ")", "=", " ", "\0", "-", "é"])) + text[at + 1 :]
    return text


def run_or_refuse(*changes: str) -> int:
    """Run the command line in an empty folder and check what it leaves there."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, moved(folder):
        Path("base.yaml").write_text(BASE, encoding="utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["run", "base.yaml", *changes, "--output", "runs", "--quiet", "--device", "cpu"])
        found = sorted(Path().rglob("results.json"))
        if code == 0:
            metrics = json.loads(found[0].read_text(encoding="utf-8"))["metrics"]
            assert 0 <= metrics["final_average_accuracy"] <= 1
        else:
            refused(code, err.getvalue())
            assert not found
    return code


def refused(code: int, text: str) -> None:
    """One line for each problem: where, what was found, what to do."""
    assert code == 2, text
    lines = [line for line in text.splitlines() if line.startswith("clframe: error: ")]
    assert lines and text.splitlines()[-len(lines) :] == lines and "Traceback" not in text
    for line in lines:
        where, _, rest = line.removeprefix("clframe: error: ").partition(": ")
        found, _, advice = rest.partition("; ")
        assert where and found and advice, text


@contextlib.contextmanager
def moved(folder: str):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def check(test, strategy, examples):
    """Try ``examples`` of ``strategy``, always the same ones."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)
    how(given(strategy)(test))()


def numbers_of_examples(few, many):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


@numbers_of_examples(7, 1000)
def test_any_mutation_of_a_config_trains_or_is_refused(examples):
    codes = []
    check(lambda changes: codes.append(run_or_refuse(*changes)), st.lists(overrides(), min_size=1, max_size=2), examples)
    assert set(codes) == {0, 2} and codes.count(0) > examples / 10, codes


@numbers_of_examples(30, 1000)
def test_any_strategy_expression_trains_or_is_refused(examples):
    codes = []
    check(lambda text: codes.append(run_or_refuse(f"strategy={text}", "components={}")), expressions(), examples)
    assert set(codes) == {0, 2} and codes.count(0) > examples / 10, codes


@numbers_of_examples(40, 400)
def test_any_text_of_an_override_is_read_or_refused(examples):
    def read(parts):
        text = "".join(parts)
        try:
            load_config("quickstart", [text])
        except ClframeError as error:
            refused(2, f"clframe: error: {' '.join(str(error).splitlines())}")

    pieces = ["trainer", "epochs", ".", "=", "3", "[", "]", "{", "}", ":", ",", "&a", "*a", "!!python/object:os.system"]
    pieces += ["${", "oc.env:HOME", "'", '"', "#", "\n", "\t", " ", "null", "strategy", "er", "+", "defaults", "benchmark", "/"]
    check(read, st.lists(st.sampled_from(pieces), max_size=8), examples)


@pytest.mark.parametrize("change", ["trainer.loggers={}", "strategy=podnet(at=[''])", "strategy=exits(at=['zz'])"])
def test_mutations_that_once_ended_in_a_traceback_or_a_line_without_a_place(change):
    assert run_or_refuse(change) == 2


def test_every_block_of_the_schema_is_mutated():
    assert {key.partition(".")[0] for key in KEYS} >= {"name", "seed", "components", *OPEN_BLOCKS, "optimizer", "trainer"}
    assert "trainer.checkpoint.every" in KEYS
    assert len(KEYS) > 90
