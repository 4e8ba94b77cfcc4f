"""From a trained dense model to one of experts, and what came of it: what ``clframe moefy`` does.

The steps: attention projections become networks (optional), sparsity fine-tuning (optional), the split into experts,
the training of routers, and a sweep of the gate's setting, chosen on validation and measured on test data. Szatkowski
et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024); the baseline is
Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clframe.data.target import Batches, Target
from clframe.environment import environment, versions
from clframe.moe.conversion.convert import Converted, convert, targets_of, tests_of
from clframe.moe.conversion.measure import Measure, Pass, joined
from clframe.moe.conversion.options import Options
from clframe.moe.conversion.sweep import BUDGETS, Paired, Point, Sweep, best_within, combined, paired, points, sweep
from clframe.moe.conversion.training import Tick
from clframe.moe.pipeline import gate_of
from clframe.moe.routed import set_gate
from clframe.moe.router import Gate


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """A conversion and what it came to.

    Attributes:
        converted: The model.
        swept: All settings, on validation and test data.
        points: What budgets came to.
        setting: The one that the model is left with.
        times: By setting, for one sample and for a batch.
        experience_N: Of each test sample; None for a model without experiences.
    """

    converted: Converted
    swept: Sweep
    points: tuple[Point, ...]
    setting: float
    times: Mapping[float, tuple[Paired, ...]]
    experience_N: Tensor | None

    def passed(self, setting: float) -> Pass:
        """The pass over test data."""
        return self.swept.test[self.swept.values.index(setting)]


def moefy_target(target: Target, options: Options | None = None, *, tick: Tick | None = None) -> Study:
    """Convert a target's model, in place, and measure it.

    Args:
        target: Its model is dense.
        options: What to do.
        tick: Told of progress.

    Raises:
        ClframeError: A model, data or options that do not fit; nothing has been trained then.
    """
    return measured(convert(target, options or Options(), tick=tick), tick=tick)


def measured(converted: Converted, *, tick: Tick | None = None) -> Study:
    """Sweep the gate, choose by validation data, time what was chosen; the model is left with the setting asked for.

    Without one: the largest within half of the networks' cost on validation data, or the cheapest there is.
    """
    target, options = converted.target, converted.options
    measure = Measure(converted.dense, target.model, answers=converted.answers, replaced=converted.replaced)
    validation = converted.material.validation.batches(size=options.batch, limit=options.limit)
    tests = tests_of(target, options)
    most = max(layer.experts.experts for layer in converted.layers.values())
    done = 0

    def passed(gate: Gate, parts: Sequence[Batches]) -> Pass:
        nonlocal done
        done += 1
        if tick is not None:
            tick("sweep", done, done)
        return joined([measure.run(part, gate) for part in parts])

    swept = sweep(
        options.gate_kind, most=most, validation=lambda gate: passed(gate, [validation]),
        test=lambda gate: passed(gate, tests), also=() if options.asked is None else (options.asked,),
    )  # fmt: skip
    found = points(swept)
    setting = options.asked
    if setting is None:
        half = next(point for point in found if point.scope == "ffn" and point.budget == 0.5)
        setting = swept.values[half.at or 0]
    chosen = sorted({swept.values[point.at] for point in found if point.at is not None} | {setting})
    times = {value: _times(converted, value, tick=tick, of=(at + 1, len(chosen))) for at, value in enumerate(chosen)}
    recipe = replace(
        converted.recipe,
        **({"k": int(setting)} if options.gate_kind == "top_k" else {"tau": setting}),
    )
    set_gate(target.model, _gate(options, setting))
    experience_N = None
    if target.experiences:
        sizes = [sum(len(targets_of(batch)) for batch in part) for part in tests]
        experience_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Study(
        converted=replace(converted, recipe=recipe), swept=swept, points=found, setting=setting, times=times,
        experience_N=experience_N,
    )  # fmt: skip


def _gate(options: Options, setting: float) -> Gate:
    return gate_of(options.gate_kind, tau=setting if options.gate_kind != "top_k" else 1.0, k=int(setting) or None)


def _times(
    converted: Converted, setting: float, *, tick: Tick | None, of: tuple[int, int], sizes: Sequence[int] = (1, 32)
) -> tuple[Paired, ...]:
    target = converted.target
    set_gate(target.model, _gate(converted.options, setting))
    found = []
    for size in sizes:
        inputs = target.batches("test", size=size, limit=size)[0].inputs
        found.append(
            paired(
                converted.dense, target.model, inputs, batch=min(size, len(target.parts.test)), call=converted.answers
            )
        )
    if tick is not None:
        tick("time", *of)
    return tuple(found)


FORMAT = 1
"""Of moefy.json."""


def record(study: Study) -> dict[str, Any]:
    """All of a study but the weights; NaN is null."""
    converted, target = study.converted, study.converted.target
    options, found = converted.options, converted.material
    tree: dict[str, Any] = {
        "format": FORMAT,
        "clframe": versions()["clframe"],
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
