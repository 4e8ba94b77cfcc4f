"""A conversion as tables: text for the terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100


def summary(tree: Mapping[str, Any]) -> str:
    """What the terminal shows: layers, steps, points, time. ``tree`` is the content of moefy.json."""
    parts = [_heading(tree), _steps(tree), _layers(tree), _aligned(*points_table(tree)), *_exits(tree)]
    parts += [f"note: {note}" for note in tree["notes"]]
    return "\n\n".join(part for part in parts if part)


def markdown(tree: Mapping[str, Any]) -> str:
    """The same tables in Markdown, and the whole curve."""
    blocks = [f"# {_heading(tree)}", _steps(tree)]
    for title, (heading, rows) in (
        ("Accuracy within a budget, the setting chosen on validation data", points_table(tree)),
        ("The curve on test data", curve_table(tree)),
        ("Layers", layers_table(tree)),
        ("Experts and early exits together", exits_table(tree)),
    ):
        if rows:
            lines = ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows)]
            blocks.append(f"## {title}\n\n" + "\n".join(lines))
    blocks += [f"Note: {note}." for note in tree["notes"]]
    return "\n\n".join(blocks) + "\n"


def curve_csv(tree: Mapping[str, Any]) -> str:
    """Every setting on validation and test data, with the experts per token of each layer."""
    file, name = io.StringIO(), setting_name(tree)
    columns = ["accuracy", "ffn_share", "share"]
    writer = csv.writer(file, lineterminator="\n")
    layers = [layer["name"] for layer in tree["layers"]]
    writer.writerow([name, *(f"{part}_{c}" for part in ("validation", "test") for c in columns), *layers])
    for row in tree["curve"]:
        numbers = [row[part][column] for part in ("validation", "test") for column in columns]
        writer.writerow([row[name], *numbers, *row["test"]["experts"]])
    return file.getvalue()


def setting_name(tree: Mapping[str, Any]) -> str:
    """``tau`` or ``k``."""
    return "k" if "k" in tree["setting"] else "tau"


Table = tuple[list[str], list[list[str]]]


def points_table(tree: Mapping[str, Any]) -> Table:
    """Budgets, what they came to on test data, and the time of the same setting."""
    name = setting_name(tree)
    dense = tree["accuracy"]["dense"]
    heading = ["cost of", "budget", name, "accuracy", "to dense", "FFNs", "model", "batch 1", "batch"]
    rows = []
    for point in tree["points"]:
        scope = {"ffn": "FFNs", "model": "model"}[point["scope"]]
        if point["test"] is None:
            cheapest = f"cheapest is {_percent(point['cheapest'])}"
            rows.append([scope, _percent(point["budget"], 0), "-", cheapest, *["-"] * 5])
            continue
        test = point["test"]
        times = {one["batch"] > 1: one for one in tree["times"] if one[name] == point[name]}
        speed = [f"{times[large]['speedup']:.2f}x" if large in times else "-" for large in (False, True)]
        rows.append([
            scope, _percent(point["budget"], 0), f"{point[name]:.4g}", _percent(test["accuracy"]),
            f"{100 * (test['accuracy'] - dense):+.1f}", _percent(test["ffn_share"]), _percent(test["share"]), *speed,
        ])  # fmt: skip
    return heading, rows


def curve_table(tree: Mapping[str, Any]) -> Table:
    """Every setting on test data."""
    name = setting_name(tree)
    rows = [
        [f"{row[name]:.4g}", _percent(row["test"]["accuracy"]), _percent(row["test"]["ffn_share"]),
         _percent(row["test"]["share"])]
        for row in tree["curve"]
    ]  # fmt: skip
    return [name, "accuracy", "FFNs", "model"], rows


def layers_table(tree: Mapping[str, Any]) -> Table:
    """Sizes, and the router's part of the cost."""
    used = tree["experts_per_token"]["by_layer"]
    rows = [
        [layer["name"], f"{layer['inputs']} -> {layer['neurons']} -> {layer['outputs']}",
         f"{layer['experts']} x {layer['expert_size']}", _percent(layer["router_share"]),
         "-" if mean is None else f"{mean:.1f}"]
        for layer, mean in zip(tree["layers"], used, strict=True)
    ]  # fmt: skip
    return ["layer", "network", "experts", "router's cost", "experts a token"], rows


def exits_table(tree: Mapping[str, Any]) -> Table:
    """Within each budget of the model's cost: experts alone, exits alone, both."""
    if tree["exits"] is None:
        return [], []
    ways = list(tree["exits"]["curves"])
    rows = [
        [_percent(point["budget"], 0), *("-" if point[way] is None else
         f"{_percent(point[way]['accuracy'])} at {_percent(point[way]['share'])}" for way in ways)]
        for point in tree["exits"]["points"]
    ]  # fmt: skip
    return ["budget of the model", *ways], rows


def _heading(tree: Mapping[str, Any]) -> str:
    options, samples = tree["options"], tree["samples"]
    on = f", on {options['on']}" if options["on"] else ""
    return (
        f"{options['method']}: {tree['target']['name']}{on} ({samples['fit']} samples to train on, "
        f"{samples['validation']} to choose by, {samples['test']} to measure on)"
    )


def _steps(tree: Mapping[str, Any]) -> str:
    steps = ", ".join(f"{name} {_percent(value)}" for name, value in tree["accuracy"].items())
    lines = [f"accuracy on test data: {steps}"]
    lines.append(
        f"networks that became experts: {_percent(tree['ffn_macs'] / tree['dense_macs'])} of "
        f"{tree['dense_macs']:,.0f} MACs a sample; their routers add {_percent(tree['router_share'])} of theirs"
    )
    return "\n".join(lines)


def _layers(tree: Mapping[str, Any]) -> str:
    heading, rows = layers_table(tree)
    if len(rows) > 12:
        rows = [*rows[:6], ["..."] * len(heading), *rows[-5:]]
    return _aligned(heading, rows)


def _exits(tree: Mapping[str, Any]) -> list[str]:
    heading, rows = exits_table(tree)
    return [_aligned(heading, rows)] if rows else []


def _aligned(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [heading, *rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(heading))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * min(WIDTH, max(map(len, lines))), *lines[1:]])


def _percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %"
