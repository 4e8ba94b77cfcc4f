"""The laws of composition, and the words of its refusals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest

from clframe.core import SLOTS, Component, Composition, compose, parse
from clframe.errors import ClframeError, ComposeError, ConfigError, UnknownNameError
from strategies import ER, Cumulative, Exits, Joint, LwF, Naive


@dataclass(frozen=True, kw_only=True)
class Mixer(Component):
    name: ClassVar[str] = "mixer"
    slots: ClassVar[frozenset[str]] = frozenset({"loss_mix"})

    def combine_losses(self, terms, step, state):
        return sum(terms.values()).sum()


PARTS = [ER(memory=30), LwF(alpha=2.0), Naive(), Mixer()]


@pytest.mark.parametrize("a, b, c", list(itertools.permutations(PARTS, 3)))
def test_composing_is_associative_and_commutes(a, b, c):
    assert (a + b) + c == a + (b + c) == compose(a, b, c) == compose(c, b, a)


@pytest.mark.parametrize("part", PARTS)
def test_naive_is_the_identity(part):
    assert part + Naive() == Naive() + part == compose(part) == compose() + part
    assert compose(Naive()) == Composition(()) == parse("naive")
    assert str(compose(Naive())) == "naive"


def test_weight_zero_is_the_identity():
    assert LwF(alpha=0.0) + ER(memory=30) == compose(ER(memory=30))
    assert ER(scale=0.0) + LwF() == compose(LwF())


def test_a_clash_over_a_slot_names_both_and_the_slot():
    with pytest.raises(ComposeError, match=r"'cumulative' and 'er' both own the slot 'batch'"):
        ER() + Cumulative()
    with pytest.raises(ComposeError, match=r"'cumulative' and 'joint'"):
        Joint() + Cumulative()


def test_one_component_twice_is_refused():
    with pytest.raises(ComposeError, match="'er' appears twice"):
        ER() + LwF() + ER(memory=10)


def test_overriding_a_hook_takes_its_slot():
    @dataclass(frozen=True, kw_only=True)
    class Thief(Component):
        name: ClassVar[str] = "thief"

        def make_batch(self, batch, context, state, network):
            return batch

    with pytest.raises(ComposeError, match=r"'thief': overrides make_batch\(\) without owning the slot 'batch'"):
        compose(Thief())


def test_an_unknown_slot_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Odd(Component):
        name: ClassVar[str] = "odd"
        slots: ClassVar[frozenset[str]] = frozenset({"door"})

    with pytest.raises(ComposeError, match="unknown slots"):
        compose(Odd())


@pytest.mark.parametrize("what", ["er", 3, None, ER])
def test_only_components_compose(what):
    with pytest.raises(ComposeError, match="cannot compose"):
        compose(what)


def test_owner_and_who_acts_where():
    strategy = LwF() + ER() + Mixer()
    assert [c.name for c in strategy] == ["er", "lwf", "mixer"]
    assert {slot: getattr(strategy.owner(slot), "name", None) for slot in SLOTS} == {
        "batch": "er", "classifier": None, "exit_weights": None, "task_loss": None, "loss_mix": "mixer",
        "gradient": None, "logits": None, "prediction": None,
    }  # fmt: skip
    assert [c.name for c in strategy.acting_at("after_experience")] == ["er", "lwf"]
    assert strategy.acting_at("modify_gradients") == ()
    assert ER().acts_at() == ("init_state", "make_batch", "after_experience")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("er", compose(ER())),
        (" er+lwf ", ER() + LwF()),
        ("lwf(alpha=2) + er(memory=7)", ER(memory=7) + LwF(alpha=2.0)),
        ("(er + naive) + (lwf)", ER() + LwF()),
        ("naive", compose()),
        ("lwf(alpha=0) + er", compose(ER())),
        # options are spelled as in a YAML config too
        ("er(replay=concatenate, memory=7)", compose(ER(replay="concatenate", memory=7))),
        ("exits(cascade=true, at=[layer1, layer2], count=null)", compose(Exits(cascade=True, at=("layer1", "layer2")))),
        ("exits(cascade=False, cascade_norm=off, ensemble='mean')", compose(Exits(ensemble="mean"))),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected


def test_options_in_the_text_win_over_the_block():
    block = {"er": {"memory": 11, "ratio": 2.0}, "lwf": {"alpha": 3}}
    assert parse("er(memory=5)", block) == compose(ER(memory=5, ratio=2.0))


@pytest.mark.parametrize("text", ["", "er +", "er lwf", "er * lwf", "er - lwf", "2", "'er'", "er(100)",
                                  "er(*[1])", "er(**{'memory': 3})", "er(memory=abs(3))", "er.x", "x.er()",
                                  "[er]", "lambda: 0", "er if er else lwf",
                                  "er(memory=__import__('os'))"])  # fmt: skip
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ConfigError, match=r"^strategy: "):
        parse(text)


def test_a_long_sum_is_no_danger():
    with pytest.raises(ClframeError):
        parse(" + ".join(["er"] * 20_000))
    with pytest.raises(ClframeError):
        parse("(" * 5_000 + "er" + ")" * 5_000)


def test_an_unknown_component_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown component 'lwff'; did you mean 'lwf'\?"):
        parse("er + lwff")


def test_components_are_frozen_options():
    with pytest.raises(AttributeError):
        ER().memory = 3  # type: ignore[misc]
    assert ER(memory=3) == ER(memory=3) != ER(memory=4)
    assert len({ER(memory=3), ER(memory=3)}) == 1
