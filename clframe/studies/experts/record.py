"""What a conversion came to, as plain values: the content of moefy.json, and rows for tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from clframe import __version__
from clframe.reporting.folder import environment
from clframe.studies.experts.measure import Pass
from clframe.studies.experts.study import Study
from clframe.studies.experts.sweep import BUDGETS, Point, best_within, combined

FORMAT = 1
"""Of moefy.json."""


def record(study: Study) -> dict[str, Any]:
    """All of a study but the weights; NaN is null."""
    converted, target = study.converted, study.converted.target
    options, found = converted.options, converted.material
    tree: dict[str, Any] = {
        "format": FORMAT,
        "clframe": __version__,
        "target": {"name": target.name, "kind": target.kind},
        "options": {**options.as_tree(), "on": found.on},
        "recipe": converted.recipe.as_tree(),
        "convention": "macs: one multiply-add counts 1; shares of the dense model's; padding is computed and counted",
        "notes": list(found.notes),
        "samples": {
            "fit": len(found.fit), "validation": _limited(len(found.validation), options.limit),
            "test": len(study.swept.test[0].y_N),
        },
        "layers": layers_of(study),
        "router_share": router_share(study),
        "accuracy": dict(converted.accuracies),
        "losses": {
            "projections": list(converted.distilled), "routers": list(converted.router_losses),
            "task": list(converted.tuned.task if converted.tuned else ()),
            "penalty": list(converted.tuned.penalty if converted.tuned else ()),
        },
        "dense_macs": float(study.swept.test[0].dense_N.mean()),
        "ffn_macs": float(study.swept.test[0].dense_ffn_N.mean()),
        "setting": {"gate": study.swept.kind, setting_name(study): study.setting},
        "curve": curve(study),
        "points": [_point(study, point) for point in study.points],
        "times": [
            {setting_name(study): value, **asdict(one)} for value, times in study.times.items() for one in times
        ],
        "experts_per_token": experts_per_token(study),
        "exits": exits(study),
        "environment": environment(),
    }  # fmt: skip
    return {key: _plain(value) for key, value in tree.items()}


def setting_name(study: Study) -> str:
    """``k``, or ``tau``."""
    return "k" if study.swept.kind == "top_k" else "tau"


def layers_of(study: Study) -> list[dict[str, Any]]:
    """Sizes of each layer, and its router's part of the cost."""
    rows = []
    for name, layer in study.converted.layers.items():
        macs = layer.macs()
        whole = study.converted.replaced.get(name, macs.dense)
        rows.append({
            "name": name, "inputs": layer.experts.inputs, "outputs": layer.experts.outputs,
            "neurons": layer.experts.experts * layer.experts.expert_size, "experts": layer.experts.experts,
            "expert_size": layer.experts.expert_size, "projection": name in study.converted.replaced,
            "dense_macs": whole, "expert_macs": macs.expert, "router_macs": macs.router,
            "router_share": macs.router / whole,
        })  # fmt: skip
    return rows


def router_share(study: Study) -> float:
    """The routers' MACs over those of the dense networks that became experts, over the tokens of the test data."""
    one = study.swept.test[0]
    router_L = torch.tensor([layer.macs().router for layer in study.converted.layers.values()], dtype=torch.float64)
    return float((one.tokens_NL.double() @ router_L).sum() / one.dense_ffn_N.sum())


def curve(study: Study) -> list[dict[str, Any]]:
    """Every setting, on validation and on test data."""
    name = setting_name(study)
    return [
        {
            name: value, "validation": _numbers(validation),
            "test": {**_numbers(test), "experts": test.experts_per_token()},
        }
        for value, validation, test in zip(
            study.swept.values, study.swept.validation, study.swept.test, strict=True
        )
    ]  # fmt: skip


def experts_per_token(study: Study) -> dict[str, Any]:
    """Of the chosen setting, on test data: by layer, by class and layer, by experience and layer."""
    one = study.passed(study.setting)
    classes = sorted({int(c) for c in one.y_N.unique() if c >= 0})
    run = study.converted.target.run
    by_experience = []
    if study.experience_N is not None:
        count = int(study.experience_N.max()) + 1
        by_experience = [one.experts_per_token(study.experience_N == e) for e in range(count)]
    return {
        "layers": list(study.converted.layers),
        "by_layer": one.experts_per_token(),
        "classes": [c if run is None else run.class_order[c] for c in classes],
        "by_class": [one.experts_per_token(one.y_N == c) for c in classes],
        "by_experience": by_experience,
        "router_asked": not _keeps_all(study),
    }


def exits(study: Study) -> dict[str, Any] | None:
    """Experts and early exits together, chosen on validation data, read off on test data; None without exits."""
    run = study.converted.target.run
    if run is None or len(run.network.heads) < 2:
        return None
    name, swept = setting_name(study), study.swept
    whole = [swept.values.index(value) for value in swept.values if value == 1.0 and swept.kind != "top_k"]

    def shown(stop: Any) -> dict[str, Any] | None:
        if stop is None:
            return None
        return {
            name: swept.values[stop.at], "threshold": stop.threshold, "accuracy": stop.accuracy, "share": stop.share,
            "by_exit": list(stop.by_exit),
        }  # fmt: skip

    ways: dict[str, dict[str, Any]] = {"both": {}, "experts": {"thresholds": (2.0,)}}
    if whole:
        ways["exits"] = {"gates": whole}
    return {
        "names": list(run.network.exit_names),
        "curves": {way: [shown(stop) for stop in combined(swept, **chosen)] for way, chosen in ways.items()},
        "points": [
            {"budget": budget, **{way: shown(best_within(swept, budget, **chosen)) for way, chosen in ways.items()}}
            for budget in BUDGETS
        ],
    }


def _numbers(one: Pass) -> dict[str, float]:
    return {"accuracy": one.accuracy, "ffn_share": one.ffn_share, "share": one.share}


def _point(study: Study, point: Point) -> dict[str, Any]:
    row = {"scope": point.scope, "budget": point.budget, "cheapest": point.cheapest}
    if point.at is None:
        return {**row, setting_name(study): None, "test": None}
    return {
        **row, setting_name(study): study.swept.values[point.at], "test": _numbers(study.swept.test[point.at]),
        "validation": _numbers(study.swept.validation[point.at]),
    }  # fmt: skip


def _keeps_all(study: Study) -> bool:
    return study.swept.kind != "top_k" and study.setting == 1.0


def _limited(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
