"""docs/strategies.md is what the code says, and every component says what a card needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import strategies
from clframe.report.explanation import described

DOCS = str(Path(__file__).parents[2] / "docs")

sys.path.insert(0, DOCS)
try:
    import make_cards
finally:
    sys.path.remove(DOCS)

KINDS = {kind.name: kind for kind in strategies.COMPONENTS}
BOUNDS = {"naive", "joint", "cumulative", "freeze"}
"""What nobody published as a method."""


def card(name):
    parts = re.split(r"^## ", make_cards.cards(), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(f"{name}\n"))


def test_the_committed_cards_are_those_of_the_code():
    same = make_cards.FILE.read_text(encoding="utf-8") == make_cards.cards()
    assert same, "docs/strategies.md is not what the docstrings say now; write it anew with: python docs/make_cards.py"


@pytest.mark.parametrize("name", KINDS)
def test_a_docstring_says_when_to_use_it_what_it_costs_and_where_it_is_from(name):
    item = described(KINDS[name])
    text = " ".join(item.paragraphs)
    assert re.search(r"(^|[.:;] )(Use it|Use them|For|Meant for|Best where|Best for)\b", text), "when is it of use?"
    assert re.search(r"\b[Cc]osts?\b", text), "what does it cost?"
    assert name in BOUNDS or re.search(r'".+" \(\d{4}\)', text), "where is it from?"
    assert all(option.text.endswith((".", ".)")) for option in item.options), "what does each option do?"


def test_every_component_has_one_card_and_one_line():
    text = make_cards.cards()
    assert re.findall(r"^## (\w+)$", text, flags=re.MULTILINE) == re.findall(r"^\| \[(\w+)\]", text, flags=re.MULTILINE)
    assert sorted(re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)) == sorted(KINDS)


def test_nobody_stands_in_two_families():
    members = [name for names in make_cards.FAMILIES.values() for name in names]
    assert len(members) == len(set(members))


def test_who_is_in_no_family_stands_under_more():
    assert dict(make_cards._grouped(["er", "brand_new"]))["More"] == ["brand_new"]
    assert "More" not in dict(make_cards._grouped(["er"]))


def test_a_card_in_full():
    text = card("ssil")
    assert "*Declares:* owns `task_loss`; needs a replay buffer; logs `loss/ssil/distill`." in text
    assert "| `lamb` | number | `0.25` | Weight of the distillation: 0.25 as tuned" in text
    assert "- `strategy=strategy/ssil` (`er + ssil`): SS-IL as first published" in text
    assert "- `strategy=ssil_paper` (`er + ssil`): SS-IL as tuned in" in text
    assert "- `strategy=ssil_paper`" not in card("lwf")
    assert "has a replay buffer; no effect at `scale=0`" in card("er")


def test_bars_do_not_end_a_cell():
    assert make_cards._markdown("``a | b``", cell=True) == "`a \\| b`"
