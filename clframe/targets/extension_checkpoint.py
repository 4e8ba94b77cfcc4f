"""Checkpoint of a run as one of a longer stream.

Shape suffixes: C classes in learning order, E test experiences, K exits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clframe.build import Setup
from clframe.config.typed import to_yaml
from clframe.data.chain import count_classes
from clframe.metrics import Tally
from clframe.training.trained import describe_data, recorded_digest


def convert_checkpoint(content: Mapping[str, Any], setup: Setup, before: int) -> dict[str, Any]:
    """Return the checkpoint of a run as one of the extended stream.

    Accuracies on new experiences before they were learned are 0 where all of their classes were unknown: no class has
    a column before it is learned. They are undefined otherwise, and so are those of a language model, which predicts
    tokens of any domain and was not evaluated on this one.

    Args:
        content: The last checkpoint of the run.
        setup: The extended run.
        before: Experiences that the run has learned.
    """
    benchmark = setup.benchmark
    classes, text = len(benchmark.class_order), bool(benchmark.vocabulary)
    totals = [count_classes(part, classes) for part in benchmark.evaluation[before:]]
    brought = [set(c) for c in benchmark.classes[before:]]
    seen: list[set[int]] = []
    for own in benchmark.classes[:before]:
        seen.append({*own, *(seen[-1] if seen else ())})

    def extended(tally: Mapping[str, Any], known: set[int]) -> dict[str, Any]:
        nothing = [0] * classes
        counted = [nothing if text or own & known else list(total) for own, total in zip(brought, totals, strict=True)]
        rows = {"total_EC": counted, "correct_EC": [nothing] * len(brought)}
        rows["correct_aware_EC"] = rows["correct_EC"]
        old = Tally(**tally)
        wider: dict[str, Any] = {
            name: [*([*row, *[0] * (classes - len(row))] for row in getattr(old, name)), *more]
            for name, more in rows.items()
        }
        nats_E = [*old.nats_E, *[0.0] * len(brought)] if old.nats_E else []
        return Tally(**wider, nats_E=tuple(nats_E)).as_tree()

    exits = []
    for record, known in zip(content["exits"], seen, strict=True):
        unlearned = [math.nan if text or own & known or not sum(total) else 0.0
                     for own, total in zip(brought, totals, strict=True)]  # fmt: skip
        wider = {"accuracy_KE": [[*row, *unlearned] for row in record["accuracy_KE"]]}
        if record.get("nll_KE"):
            wider["nll_KE"] = [[*row, *unlearned] for row in record["nll_KE"]]
        exits.append({**record, **wider})
    baseline = content["baseline"]
    converted = {
        **content,
        "config": to_yaml(setup.config),
        "baseline": None if baseline is None else extended(baseline, seen[0]),
        "tallies": [extended(tally, known) for tally, known in zip(content["tallies"], seen, strict=True)],
        "exits": exits,
        "data": describe_data(benchmark, recorded=recorded_digest(content)),
    }
    for key in ("format", "finished", "file_bytes", "confusion"):
        converted.pop(key, None)
    return converted
