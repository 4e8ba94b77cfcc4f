"""Options that had another name: configs, expressions and run folders of earlier versions stay readable."""

from __future__ import annotations

import pytest

from clframe.build import build_strategy
from clframe.core import COMPONENTS, parse
from clframe.errors import ConfigError
from clframe.options import option_types


def options_of(composition, name):
    (component,) = [found for found in composition if found.name == name]
    return component


@pytest.mark.parametrize("expression", ["exits(distil=0.5)", "exits(distill=0.5)"])
def test_an_expression_may_use_either_name(expression):
    assert options_of(parse(expression), "exits").distill == 0.5


def test_a_config_block_may_use_former_names():
    composition = build_strategy("prd", {"prd": {"distil": 3.0, "distil_temperature": 2.0}})
    assert options_of(composition, "prd").distill == 3.0
    assert options_of(composition, "prd").distill_temperature == 2.0


def test_an_inline_option_wins_over_a_block_under_whatever_names():
    for block, inline in (("distil", "distill"), ("distill", "distil")):
        assert options_of(parse(f"exits({inline}=0.5)", {"exits": {block: 0.25}}), "exits").distill == 0.5


def test_a_block_of_a_component_that_is_not_selected_is_checked_under_its_former_names_too():
    build_strategy("naive", {"exits": {"distil": 0.5}})
    with pytest.raises(ConfigError, match=r"^components\.exits\.distill: found 'much' \(text\); give a number"):
        build_strategy("naive", {"exits": {"distil": "much"}})


def test_both_names_together_are_refused():
    with pytest.raises(ConfigError, match=r"^components\.exits\.distil: is the former name of 'distill'.*remove it$"):
        build_strategy("exits", {"exits": {"distil": 0.5, "distill": 0.5}})


@pytest.mark.parametrize("name", COMPONENTS.names())
def test_a_former_name_leads_to_an_option_and_is_none_itself(name):
    component = COMPONENTS.get(name)
    known = option_types(component)
    assert set(component.renamed.values()) <= set(known)
    assert not set(component.renamed) & set(known)
