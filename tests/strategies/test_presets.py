"""Presets build, and published values are under their names."""

from __future__ import annotations

import pytest

from clframe.config.files import read_yaml, shipped_configs
from clframe.core import Composition, parse

FOLDER = shipped_configs() / "strategy"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = {
    "prd": {"attract": 2.0, "distill": 4.0, "temperature": 0.1, "distill_temperature": 1.0, "projection": 128, "hidden": 512},
    "lucir": {"less_forget": 5.0, "separate": 0.5, "margin": 0.5, "negatives": 2, "eta": 1.0},
    "podnet": {"spatial": 3.0, "flat": 1.0, "proxies": 10, "margin": 0.6, "eta": 1.0},
    "sparsity": {"strength": 0.2, "regularizer": "hoyer", "relu": True, "ramp": "step"},
    "si": {"c": 0.1, "damping": 0.1},
    "mas": {"lamb": 1.0, "merge": "sum"},
    "der": {"alpha": 0.3, "memory": 500, "selection": "reservoir", "update": "step"},
    "derpp": {"alpha": 0.5, "beta": 0.5, "draws": "two", "batches": "apart"},
    "bic": {"lamb": 2.0, "temperature": 2.0, "held_out": 0.1},
    "ancl": {"lamb": 4.0, "lamb_a": 2.0, "softmax": "per_experience", "milestones": (0.3, 0.6, 0.8), "clip": 1.0},
    "icarl": {"loss": "softmax", "pooling": "max", "scores": "fourth"},
    "ewc": {"lamb": 10000.0, "alpha": 0.5, "estimate": "published", "scope": "block"},
    "lode": {"c": 4.0, "rho": 0.5},
    "lwf": {"alpha": 1.0, "temperature": 2.0},
    "ssil": {"lamb": 0.25},
    "gdumb": {"memory": 2000, "restart": "never"},
    "l2p": {"prompts": 10, "length": 5, "top": 5, "pull": 0.5},
    "ranpac": {"projection": 10000, "ridges": tuple(10.0**power for power in range(-8, 9)), "held_out": 0.2},
    "simplecil": {"scale": 1.0},
    "slda": {"shrinkage": 1e-4, "covariance": "published"},
}  # fmt: skip


def strategy_of(preset: str) -> Composition:
    config = read_yaml(FOLDER / f"{preset}.yaml")
    return parse(config["strategy"], config.get("components", {}))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_builds_and_sets_options_of_its_own_components_only(preset):
    composition = strategy_of(preset)
    composition.check_needs()
    config = read_yaml(FOLDER / f"{preset}.yaml")
    assert set(config["components"]) <= {component.name for component in composition}
    assert preset.removesuffix("_paper") in PRESETS
    assert (FOLDER / f"{preset}.yaml").read_text().startswith("# ")  # what cards say of it


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_stay_whatever_the_defaults(name):
    (component,) = [found for found in strategy_of(f"{name}_paper") if found.name == name]
    assert {option: getattr(component, option) for option in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name, option", [("ewc", "estimate"), ("gdumb", "restart")])
def test_a_listed_defect_is_one_option(name, option):
    found = {}
    for preset in (name, f"{name}_paper"):
        (component,) = [part for part in strategy_of(preset) if part.name == name]
        found[preset] = getattr(component, option)
    assert (
        found
        == {"ewc": {"ewc": "samples", "ewc_paper": "published"}, "gdumb": {"gdumb": "every", "gdumb_paper": "never"}}[
            name
        ]
    )
