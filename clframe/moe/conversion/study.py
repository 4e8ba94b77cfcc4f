"""Conversion of a trained dense model to experts and its evaluation, as done by ``clframe moefy``.

Steps: attention projections become networks (optional), sparsity fine-tuning (optional), split into experts, router
training, and a sweep of the gate's setting, selected on validation data and evaluated on test data. Szatkowski et al.,
"Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024); the baseline is Zhang et
al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clframe.data.target import Batches, Target
from clframe.environment import environment, versions
from clframe.moe.conversion.convert import Conversion, convert, require_targets, test_batches
from clframe.moe.conversion.measure import GateEvaluator, Pass, concatenate_passes
from clframe.moe.conversion.options import Options
from clframe.moe.conversion.sweep import (
    BUDGETS,
    BudgetPoint,
    PairedTiming,
    Sweep,
    best_within_budget,
    gate_at,
    pareto_front,
    points,
    setting_grid,
    sweep,
    time_decoding,
    time_pair,
)
from clframe.moe.conversion.training import Progress
from clframe.moe.routed import set_gate
from clframe.moe.router import Gate


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """A conversion with its evaluation.

    Attributes:
        converted: The conversion.
        swept: All settings on validation and test data.
        points: The setting selected for each budget.
        setting: Setting of the final model.
        times: Latency by setting, for one sample and for a batch.
        experience_N: Experience of each test sample; None for a model without experiences.
        top_k: For a language model, passes over test data with the k best experts of each token instead of its gate.
    """

    converted: Conversion
    swept: Sweep
    points: tuple[BudgetPoint, ...]
    setting: float
    times: Mapping[float, tuple[PairedTiming, ...]]
    experience_N: Tensor | None
    top_k: Mapping[int, Pass] = field(default_factory=dict)

    def test_pass(self, setting: float) -> Pass:
        """The pass over test data at a setting."""
        return self.swept.test[self.swept.values.index(setting)]


def moefy_target(target: Target, options: Options | None = None, *, progress: Progress | None = None) -> Study:
    """Convert a target's model in place and evaluate it.

    Args:
        target: Target with a dense model.
        options: Options of the conversion.
        progress: Called with the progress of each step.

    Raises:
        ClframeError: An unsupported model, data or options, before any training.
    """
    return measure_conversion(convert(target, options or Options(), progress=progress), progress=progress)


def measure_conversion(
    converted: Conversion, *, sizes: Sequence[int] = (1, 32), progress: Progress | None = None
) -> Study:
    """Sweep the gate, select settings on validation data, time them, and set the model's gate.

    Default setting: the largest within half of the networks' cost on validation data, else the cheapest.

    Args:
        converted: The conversion.
        sizes: Numbers of samples to time together; none times nothing.
        progress: Called with the progress of each step.
    """
    target, options = converted.target, converted.options
    evaluator = GateEvaluator(
        converted.dense, target.model, exit_logits=converted.exit_logits, replaced=converted.replaced
    )
    validation = converted.data.validation.batches(size=options.batch, limit=options.limit)
    tests = test_batches(target, options)
    most = max(layer.experts.experts - layer.shared for layer in converted.layers.values())
    done = 0

    def run_pass(gate: Gate, parts: Sequence[Batches]) -> Pass:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sweep", done, done)
        return concatenate_passes([evaluator.run(part, gate) for part in parts])

    swept = sweep(
        options.gate_kind, most=most, validation=lambda gate: run_pass(gate, [validation]),
        test=lambda gate: run_pass(gate, tests), also=() if options.asked is None else (options.asked,),
    )  # fmt: skip
    top_k = {}
    if target.logits_at is not None and options.gate_kind != "top_k":
        top_k = {int(k): run_pass(gate_at("top_k", k), tests) for k in sorted(setting_grid("top_k", most))}
    found = points(swept)
    setting = options.asked
    if setting is None:
        half = next(point for point in found if point.scope == "ffn" and point.budget == 0.5)
        setting = swept.values[half.at or 0]
    chosen = sorted({swept.values[point.at] for point in found if point.at is not None} | {setting})
    times = {
        value: _time_setting(converted, value, progress=progress, of=(number, len(chosen)), sizes=sizes)
        for number, value in enumerate(chosen, start=1)
    }
    recipe = replace(
        converted.recipe,
        **({"k": int(setting)} if options.gate_kind == "top_k" else {"tau": setting}),
    )
    set_gate(target.model, gate_at(options.gate_kind, setting))
    experience_N = None
    if target.experiences:
        sizes = [sum(len(require_targets(batch)) for batch in part) for part in tests]
        experience_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Study(
        converted=replace(converted, recipe=recipe), swept=swept, points=found, setting=setting, times=times,
        experience_N=experience_N, top_k=top_k,
    )  # fmt: skip


def _time_setting(
    converted: Conversion,
    setting: float,
    *,
    progress: Progress | None,
    of: tuple[int, int],
    sizes: Sequence[int],
) -> tuple[PairedTiming, ...]:
    target = converted.target
    set_gate(target.model, gate_at(converted.options.gate_kind, setting))
    found = []
    for size in sizes:
        inputs = target.batches("test", size=size, limit=size)[0].inputs
        batch = min(size, len(target.splits.test))
        language = target.logits_at is not None
        found.append(
            time_pair(
                converted.dense, target.model, inputs, batch=batch, call=converted.exit_logits,
                phase="prefill" if language else "forward",
            )
        )  # fmt: skip
        if language:
            found.append(time_decoding(converted.dense, target.model, inputs, batch=batch))
    if progress is not None:
        progress("time", *of)
    return tuple(found)


FORMAT = 1
"""Version of the schema of moefy.json."""


def record(study: Study) -> dict[str, Any]:
    """Content of moefy.json; NaN becomes null."""
    converted, target = study.converted, study.converted.target
    options, found = converted.options, converted.data
    tree: dict[str, Any] = {
        "format": FORMAT,
        "clframe": versions()["clframe"],
        "target": {"name": target.name, "kind": target.kind, **target.origin},
        "options": {**options.as_tree(), "on": found.on},
        "recipe": converted.recipe.as_tree(),
        "convention": "macs: one multiply-add counts 1; shares of the dense model's; padding is computed and counted",
        "notes": list(found.notes),
        "samples": {
            "fit": len(found.fit), "validation": _capped(len(found.validation), options.limit),
            "test": len(study.swept.test[0].y_N),
        },
        "layers": layers_of(study),
        "router_share": router_share(study),
        "accuracy": dict(converted.accuracies),
        "perplexity": dict(converted.perplexities),
        "losses": {
            "projections": list(converted.distilled), "routers": list(converted.router_losses),
            "task": list(converted.tuned.task if converted.tuned else ()),
            "penalty": list(converted.tuned.penalty if converted.tuned else ()),
        },
        "dense_macs": float(study.swept.test[0].dense_N.mean()),
        "ffn_macs": float(study.swept.test[0].dense_ffn_N.mean()),
        "setting": {"gate": study.swept.kind, setting_name(study): study.setting},
        "curve": curve(study),
        "top_k": [{"k": k, "test": _numbers(one)} for k, one in study.top_k.items()],
        "points": [_point(study, point) for point in study.points],
        "times": [
            {setting_name(study): value, **asdict(one)} for value, times in study.times.items() for one in times
        ],
        "experts_per_token": experts_per_token(study),
        "exits": exits(study),
        "environment": environment(),
    }  # fmt: skip
    return {key: _to_json(value) for key, value in tree.items()}


def setting_name(study: Study) -> str:
    """``k`` or ``tau``."""
    return "k" if study.swept.kind == "top_k" else "tau"


def layers_of(study: Study) -> list[dict[str, Any]]:
    """Sizes of each layer, and its router's relative cost."""
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
    """Router MACs as a fraction of those of the converted networks in the dense model, over the test data."""
    one = study.swept.test[0]
    router_L = torch.tensor([layer.macs().router for layer in study.converted.layers.values()], dtype=torch.float64)
    return float((one.tokens_NL.double() @ router_L).sum() / one.dense_ffn_N.sum())


def curve(study: Study) -> list[dict[str, Any]]:
    """Every setting on validation and test data."""
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
    """Mean active experts at the chosen setting on test data: by layer, by class and layer, by experience and layer."""
    one = study.test_pass(study.setting)
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
    """Experts and early exits combined, selected on validation data and evaluated on test data; None without exits."""
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
        "curves": {way: [shown(stop) for stop in pareto_front(swept, **chosen)] for way, chosen in ways.items()},
        "points": [
            {"budget": budget}
            | {way: shown(best_within_budget(swept, budget, **chosen)) for way, chosen in ways.items()}
            for budget in BUDGETS
        ],
    }


def _numbers(one: Pass) -> dict[str, float]:
    found = {"accuracy": one.accuracy, "ffn_share": one.ffn_share, "share": one.share}
    if one.perplexity is not None:
        found |= {"perplexity": one.perplexity, "macs_per_token": one.macs_per_token}
    return found


def _point(study: Study, point: BudgetPoint) -> dict[str, Any]:
    row = {"scope": point.scope, "budget": point.budget, "cheapest": point.cheapest}
    if point.at is None:
        return {**row, setting_name(study): None, "test": None}
    return {
        **row, setting_name(study): study.swept.values[point.at], "test": _numbers(study.swept.test[point.at]),
        "validation": _numbers(study.swept.validation[point.at]),
    }  # fmt: skip


def _keeps_all(study: Study) -> bool:
    return study.swept.kind != "top_k" and study.setting == 1.0


def _capped(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def _to_json(value: Any) -> Any:
    """Replace NaN, infinity and tuples by JSON values."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_json(item) for item in value]
    return value
