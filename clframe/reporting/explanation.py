"""What a run would do, in words: printed by ``clframe explain`` before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clframe.accounting import count_macs, count_parameters, stage_macs
from clframe.core import HOOKS, SLOTS, Composition
from clframe.data import Benchmark
from clframe.nn import Network

_WHEN = {
    "edit": "once, before training",
    "init": "once, before training",
    "sources": "start of experience: data",
    "pool": "start of experience: pool",
    "grow": "start of experience: outputs",
    "prepare": "start of experience: state",
    "begin_epoch": "start of epoch",
    "weigh": "start of epoch: exits' weights",
    "batch": "every step: batch",
    "task": "every step: loss on the targets",
    "losses": "every step: loss terms",
    "mix": "every step: mixing the terms",
    "project": "every step: gradient",
    "after_step": "every step: updated weights",
    "advance": "end of experience",
    "answers": "every prediction: each exit",
    "decide": "every prediction",
    "cost": "the ledger",
}


def explanation(
    *,
    config: str,
    composition: Composition,
    benchmark: Benchmark,
    network: Network,
    plugins: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> str:
    """Resolved config, stream, timetable, loss terms, slots, parameters and MACs, as text.

    ``network`` has already grown to all classes of the benchmark; ``plugins`` are Avalanche's, by class name.
    """
    return "\n\n".join(
        f"{title}\n{_indent(body)}"
        for title, body in (
            ("config", config.strip()),
            ("stream (who learns what when)", _stream(benchmark)),
            ("strategy", str(composition)),
            ("timetable (who acts where)", _timetable(composition)),
            ("loss terms", "\n".join(_terms(composition))),
            ("slots", "\n".join(f"{slot:<10} {_owner(composition, slot)}" for slot in SLOTS)),
            *([("plugins of Avalanche's, beside the components", _plugins(plugins))] if plugins else ()),
            ("network with all classes", _network(network)),
        )
    )


def _stream(benchmark: Benchmark) -> str:
    lines = []
    for i in range(len(benchmark)):
        sizes = f"{sum(len(benchmark.train[k]) for k in benchmark.parts_of(i)):>7,} train "
        if benchmark.validation:
            sizes += f"{len(benchmark.validation[i]):>7,} validation "
        sizes += f"{len(benchmark.test[i]):>7,} test"
        lines.append(f"experience {i:>3} {sizes}   {benchmark.title(i)}")
    online = benchmark.online
    if online is not None:
        told = "told" if online.boundaries else "not told"
        parts = " + ".join(str(len(benchmark.parts_of(i))) for i in range(len(benchmark)))
        lines.append(f"online: {parts} small experiences of {online.size} samples, boundaries {told}")
    if benchmark.domains:
        lines.append(f"every experience brings all {len(benchmark.class_order)} classes")
    if benchmark.task_labels:
        lines.append("every experience has its number as task label")
    lines.append(f"accuracies are measured on {benchmark.evaluate} data")
    return "\n".join(lines)


def _timetable(composition: Composition) -> str:
    lines = []
    for hook in HOOKS:
        names = " + ".join(component.name for component in composition.acting_at(hook))
        lines.append(f"{hook:<11} {_WHEN[hook]:<30} {names or '-'}")
    return "\n".join(lines)


def _terms(composition: Composition) -> list[str]:
    own = [f"loss/{c.name}/{term}" for c in composition for term in c.terms]
    return ["loss/task/ce", *own]


def _plugins(plugins: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = [f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" for name, options in plugins]
    lines += [
        "what they add to the loss is in no loss term above and their memory in no cost",
        "their state is in no checkpoint: the run cannot be resumed, and clframe.load gives the network without them",
    ]
    return "\n".join(lines)


def _owner(composition: Composition, slot: str) -> str:
    owner = composition.owner(slot)
    return "-" if owner is None else owner.name


def _network(network: Network) -> str:
    shape = network.input_shape
    macs = stage_macs(network)
    lines = [
        f"parameters     {count_parameters(network):,}",
        f"MACs a sample  {count_macs(network, shape):,} (one multiply-add = 1; FLOPs = 2 x MACs)",
        f"input          {' x '.join(map(str, shape))}",
    ]
    width = max(len(name) for name in macs)
    for name, count in macs.items():
        tap = network.backbone.tap_shapes.get(name)
        shown = f"  tap {' x '.join(map(str, tap))}" if tap else ""
        lines.append(f"  {name:<{width}} {count:>14,}{shown}")
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
