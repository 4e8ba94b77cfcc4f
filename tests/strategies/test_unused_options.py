"""Options of components that nothing reads next to the others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import clframe
from clframe.core import COMPONENTS


def unused(expression: str) -> dict[str, Mapping[str, str]]:
    return {component.name: component.unused_options for component in clframe.parse(expression)}


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("er(replayed=64)", {"replayed": "replay is extra"}),
        ("er(replayed=64, replay=fixed)", {}),
        ("er(ratio=2.0, replay=half)", {"ratio": "replay is half"}),
        ("derpp(ratio=2.0, replayed=5, replay=half)", {"ratio": "replay is half", "replayed": "replay is half"}),
        ("exits(temperature=4.0)", {"temperature": "distill is 0"}),
        ("exits(temperature=4.0, distill=1.0)", {}),
        ("exits(trunk_share=0.3)", {"trunk_share": "the regime is joint"}),
        ("exits(trunk_share=0.3, regime=mixed)", {}),
        ("exits(fit_epochs=3, fit_on=training)", {"fit_on": "the ensemble is not geometric", "fit_epochs": "the ensemble is not geometric"}),
        ("exits(fit_epochs=3, ensemble=geometric)", {}),
        ("exits(hidden=32, head=linear)", {"hidden": "the head is linear"}),
        ("exits(hidden=32)", {}),
        ("early_exit(solver=quantiles, budget_rule=one_standard_error)", None),
        ("early_exit(solver=quantiles)", {"solver": "there is no budget"}),
        ("early_exit(threshold=0.5, budget=0.5)", {"threshold": "the budget replaces it"}),
        ("early_exit(threshold=0.5)", {}),
        ("ewc(gamma=0.5)", {"gamma": "mode is separate"}),
        ("ewc(gamma=0.5, alpha=0.3, mode=online)", {"alpha": "mode is online"}),
        ("ewc(alpha=0.3, mode=merged)", {}),
        ("moe(gate=top_k, tau=0.5)", {"tau": "the gate is top_k"}),
        ("moe(k=3)", {"k": "the gate is dynamic_k"}),
        ("moe(k=3, gate=top_k)", {}),
    ],
)  # fmt: skip
def test_options_that_nothing_reads(expression: str, found: dict[str, str] | None) -> None:
    if found is None:  # refused for another reason
        with pytest.raises(clframe.ClframeError):
            clframe.parse(expression)
        return
    assert list(unused(expression).values()) == [found]


@pytest.mark.parametrize("name", COMPONENTS.names())
def test_defaults_are_never_without_effect(name: str) -> None:
    assert all(not options for options in unused(name).values())
