"""From a trained dense model to one of experts, and what came of it: what ``clframe moefy`` does.

The steps: attention projections become networks (optional), sparsity fine-tuning (optional), the split into experts,
the training of routers, and a sweep of the gate's setting, chosen on validation and measured on test data. Szatkowski
et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024); the baseline is
Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clframe.nn.moe import set_gate
from clframe.nn.moe.recipe import gate_of
from clframe.nn.moe.router import Gate
from clframe.studies.batches import Batches
from clframe.studies.experts.convert import Converted, convert, targets_of, tests_of
from clframe.studies.experts.measure import Measure, Pass, joined
from clframe.studies.experts.options import Options
from clframe.studies.experts.sweep import Point, Sweep, points, sweep
from clframe.studies.experts.time import Paired, paired
from clframe.studies.experts.tune import Tick
from clframe.studies.target import Target


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
