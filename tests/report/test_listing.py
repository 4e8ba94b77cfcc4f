"""One line each; what is asked for by name, with its options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from clframe.core import COMPONENTS
from clframe.data import SOURCES
from clframe.nn import BACKBONES
from clframe.report.explanation import as_yaml, described, in_words, listing

REGISTRIES = {"strategies": COMPONENTS, "benchmarks": SOURCES, "backbones": BACKBONES}


@pytest.mark.parametrize("what", REGISTRIES)
def test_one_line_each_with_the_first_sentence(what):
    lines = listing(what)
    assert [line.split()[0] for line in lines] == list(REGISTRIES[what].names())
    starts = {line.index(line.split(maxsplit=1)[1]) for line in lines}
    assert starts == {2 + max(map(len, REGISTRIES[what].names()))}


def test_metrics_and_confidence_measures_have_a_line_each():
    assert "forgetting                         forgetting (%); lower is better" in listing("metrics")
    assert listing("exit-metrics", filter="eefp") == ["eefp                     EEFP (%); higher is better"]
    (margin,) = listing("confidence-measures", filter="the two largest")
    assert margin == "margin           Difference between the two largest class probabilities; 1 with a single class."


def test_a_line_says_what_is_needed():
    lines = {line.split()[0]: line for line in listing("strategies")}
    needing = {name for name, line in lines.items() if line.endswith("[needs a memory]")}
    assert needing == {name for name, kind in COMPONENTS.items() if kind.needs_memory} and "icarl" in needing
    assert listing("backbones", filter="timm")[0].endswith("[needs model=...]")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal_and_keep_what_is_needed(width):
    lines = listing("strategies", width=width)
    assert len(lines) == len(COMPONENTS.names())
    assert max(map(len, lines)) <= width
    lode = next(line for line in lines if line.startswith("lode "))
    assert lode.endswith("... [needs a memory]") == (width < len(listing("strategies", filter="lode")[0]))


def test_a_name_asks_for_one_and_its_options():
    first, *options = listing("strategies", filter="LwF")
    assert first.startswith("lwf ") and first.endswith("the model of the last experience.")
    assert options == [
        "  alpha=1.0  (number) Weight of the term.",
        "  temperature=2.0  (number) T; higher values give more weight to small probabilities.",
    ]


def test_a_name_is_not_looked_for_in_other_lines():
    names = [line.split()[0] for line in listing("strategies", filter="er") if not line.startswith(" ")]
    assert names == ["er"]


def test_long_texts_of_options_are_folded_and_not_lost():
    lines = listing("strategies", filter="bic", width=50)[1:]
    assert max(map(len, lines)) <= 50
    text = " ".join(" ".join(lines).split())
    assert "lamb=null (number or null) Weight of KD next to a cross-entropy of weight 1;" in text


def test_other_words_are_looked_for_in_names_sentences_and_options():
    assert [line.split()[0] for line in listing("backbones", filter="SHORTCUT=")] == ["resnet20", "resnet32"]
    assert [line.split()[0] for line in listing("strategies", filter="Dark experience")] == ["der", "derpp"]
    assert listing("strategies", filter="no such thing") == []


def test_configs_are_cut_too_unless_there_is_one():
    assert max(map(len, listing("configs", width=70))) <= 70
    assert "T = 2, times T^2." in listing("configs", filter="a softmax for each old experience", width=70)[0]


def test_sections_behind_the_options_are_not_part_of_them():
    def make(*, path: str, width: int = 8):
        """Make it.

        A second paragraph:
        of two lines.

        Args:
            path: Where to.
                Or there.
            width: Units.

        Raises:
            ValueError: Never: it cannot.
        """

    item = described(make)
    assert (item.summary, item.paragraphs) == ("Make it.", ("A second paragraph: of two lines.",))
    assert [(option.name, option.default, option.text) for option in item.options] == [
        ("path", None, "Where to. Or there."), ("width", "8", "Units."),
    ]  # fmt: skip


@pytest.mark.parametrize("annotation, words", [
    (int | None, "whole number or null"), (bool, "true or false"), (Path, "path"), (tuple[int, ...], "list"),
    (dict[str, int], "mapping"), (Literal["a", 2], "a or 2"), (Literal["auto"] | tuple[str, ...], "auto or list"),
])  # fmt: skip
def test_types_in_words(annotation, words):
    assert in_words(annotation) == words


@pytest.mark.parametrize("value, text", [(None, "null"), (False, "false"), ((1, None), "[1, null]"), (0.5, "0.5"), ("", "''")])
def test_defaults_as_yaml(value, text):
    assert as_yaml(value) == text
