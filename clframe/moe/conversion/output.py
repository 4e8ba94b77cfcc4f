"""Tables and figures of a conversion."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from typing import Any

from clframe.plotting.images import draw_heat_map
from clframe.plotting.style import MUTED, Picture, label, legend, percent, series_style
from clframe.tables import Table, to_markdown, to_text


def summary(tree: Mapping[str, Any]) -> str:
    """Terminal output: layers, steps, budgets and latency. ``tree`` is the content of moefy.json."""
    shown = [_shortened(layers_table(tree)), points_table(tree), exits_table(tree)]
    parts = [_heading(tree), _steps(tree), *(to_text(table) for table in shown if table.rows)]
    parts += [f"note: {note}" for note in tree["notes"]]
    return "\n\n".join(part for part in parts if part)


def markdown(tree: Mapping[str, Any]) -> str:
    """The tables in Markdown, with the whole curve."""
    blocks = [f"# {_heading(tree)}", _steps(tree)]
    for table in (
        points_table(tree), curve_table(tree), language_table(tree), layers_table(tree), exits_table(tree)
    ):  # fmt: skip
        if table.rows:
            blocks.append(to_markdown(table).rstrip())
    blocks += [f"Note: {note}." for note in tree["notes"]]
    return "\n\n".join(blocks) + "\n"


def curve_csv(tree: Mapping[str, Any]) -> str:
    """Every setting on validation and test data as CSV, with the experts per token of each layer."""
    file, name = io.StringIO(), setting_name(tree)
    columns = ["accuracy", "ffn_share", "share", *(["perplexity", "macs_per_token"] if tree["perplexity"] else [])]
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


def _table(name: str, title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(name=name, title=title, columns=tuple(heading), rows=tuple(map(tuple, rows)))


def points_table(tree: Mapping[str, Any]) -> Table:
    """Budgets with their test results, and the speedup over the dense model at the same setting."""
    name = setting_name(tree)
    language = bool(tree["perplexity"])
    score = "perplexity" if language else "accuracy"
    dense = tree[score]["dense"]
    heading = ["cost of", "budget", name, score, "to dense", "FFNs", "model"]
    large = max((one["batch"] for one in tree["times"]), default=1)
    many = f"batch {large}" if large > 1 else "larger batch"
    heading += [f"speedup, {size}" for size in ("batch 1", many)]
    heading += [f"decoding, {size}" for size in ("batch 1", many)] if language else []
    rows = []
    for point in tree["points"]:
        scope = {"ffn": "FFNs", "model": "model"}[point["scope"]]
        if point["test"] is None:
            cheapest = f"cheapest is {_percent(point['cheapest'])}"
            rows.append([scope, _percent(point["budget"], 0), "-", cheapest, *["-"] * (len(heading) - 4)])
            continue
        test = point["test"]
        times = {(one["phase"] == "decode", one["batch"] > 1): one for one in tree["times"] if one[name] == point[name]}
        columns = [(decode, large) for decode in ((False, True) if language else (False,)) for large in (False, True)]
        speed = [f"{times[column]['speedup']:.2f}x" if column in times else "-" for column in columns]
        rows.append([
            scope, _percent(point["budget"], 0), f"{point[name]:.4g}",
            *(
                [_perplexity(test["perplexity"]), _rise(test["perplexity"], dense)] if language
                else [_percent(test["accuracy"]), f"{100 * (test['accuracy'] - dense):+.1f}"]
            ),
            _percent(test["ffn_share"]), _percent(test["share"]), *speed,
        ])  # fmt: skip
    title = f"{score.capitalize()} within a budget, the setting chosen on validation data"
    return _table("points", title, heading, rows)


def curve_table(tree: Mapping[str, Any]) -> Table:
    """Every setting on test data."""
    name = setting_name(tree)
    rows = [
        [f"{row[name]:.4g}", _percent(row["test"]["accuracy"]), _percent(row["test"]["ffn_share"]),
         _percent(row["test"]["share"])]
        for row in tree["curve"]
    ]  # fmt: skip
    return _table("curve", "The curve on test data", [name, "accuracy", "FFNs", "model"], rows)


def language_table(tree: Mapping[str, Any]) -> Table:
    """Perplexity and cost per token of every setting on test data, and of top-k; no rows for other models."""
    name = setting_name(tree)
    rows = [
        [label, _perplexity(row["test"]["perplexity"]), _percent(row["test"]["accuracy"]),
         f"{row['test']['macs_per_token']:,.0f}", _percent(row["test"]["ffn_share"])]
        for of, key in (("curve", name), ("top_k", "k"))
        for row in (tree[of] if tree["perplexity"] else [])
        for label in [f"{key} {row[key]:.4g}"]
    ]  # fmt: skip
    heading = ["setting", "perplexity", "accuracy", "MACs per token", "FFNs"]
    return _table("language", "Perplexity against cost on test data", heading, rows)


def layers_table(tree: Mapping[str, Any]) -> Table:
    """Sizes of layers and relative cost of routers."""
    used = tree["experts_per_token"]["by_layer"]
    rows = [
        [layer["name"], f"{layer['inputs']} -> {layer['neurons']} -> {layer['outputs']}",
         f"{layer['experts']} x {layer['expert_size']}", _percent(layer["router_share"]),
         "-" if mean is None else f"{mean:.1f}"]
        for layer, mean in zip(tree["layers"], used, strict=True)
    ]  # fmt: skip
    return _table("layers", "Layers", ["layer", "network", "experts", "router's cost", "experts a token"], rows)


def exits_table(tree: Mapping[str, Any]) -> Table:
    """For each budget of the model's cost: experts only, exits only, and both; no rows without exits."""
    title = "Experts and early exits together"
    if tree["exits"] is None:
        return _table("exits", title, ["budget of the model"], [])
    ways = list(tree["exits"]["curves"])
    rows = [
        [_percent(point["budget"], 0), *("-" if point[way] is None else
         f"{_percent(point[way]['accuracy'])} at {_percent(point[way]['share'])}" for way in ways)]
        for point in tree["exits"]["points"]
    ]  # fmt: skip
    return _table("exits", title, ["budget of the model", *ways], rows)


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
    if tree["perplexity"]:
        steps = ", ".join(f"{name} {_perplexity(value)}" for name, value in tree["perplexity"].items())
        lines.append(f"perplexity on test data: {steps}")
    lines.append(
        f"networks that became experts: {_percent(tree['ffn_macs'] / tree['dense_macs'])} of "
        f"{tree['dense_macs']:,.0f} MACs a sample; their routers add {_percent(tree['router_share'])} of theirs"
    )
    return "\n".join(lines)


def _shortened(table: Table) -> Table:
    """First and last rows of a long table."""
    if len(table.rows) <= 12:
        return table
    return replace(table, rows=(*table.rows[:6], ("...",) * len(table.columns), *table.rows[-5:]))


def _percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %"


def _perplexity(value: float | None) -> str:
    """A perplexity; None where it exceeds the range of a float."""
    return "infinite" if value is None else f"{value:,.2f}"


def _rise(value: float | None, dense: float | None) -> str:
    return "-" if value is None or dense is None else f"{100 * (value / dense - 1):+.1f} %"


SHARE = "cost in % of the dense model's"


def pictures(tree: Mapping[str, Any]) -> Iterator[Picture]:
    """Figures: accuracy against cost, experts per token by layer, class and experience, and the cost of routers."""
    text = "Accuracy against cost as the gate's setting moves, on test data."
    yield Picture("accuracy_cost", text, partial(_draw_curve, tree))
    if tree["perplexity"]:
        text = "Perplexity against cost as the gate's setting moves, and with the k best experts, on test data."
        yield Picture("perplexity_cost", text, partial(_draw_perplexity, tree))
    yield Picture("experts_by_layer", "Experts a token runs, by layer, at each setting.", partial(_draw_by_layer, tree))
    text = "The router's cost in % of its dense network's."
    yield Picture("router_share", text, partial(_draw_routers, tree), _figure_height(tree))
    used = tree["experts_per_token"]
    layers = [_short_name(name) for name in used["layers"]]
    if used["by_class"]:
        draw = partial(_draw_heatmap, used["by_class"], [str(c) for c in used["classes"]], layers, "class")
        yield Picture("experts_by_class", "Experts a token runs, by class and layer.", draw, 3.6)
    if used["by_experience"]:
        names = [str(e) for e in range(len(used["by_experience"]))]
        draw = partial(_draw_heatmap, used["by_experience"], names, layers, "experience")
        yield Picture("experts_by_experience", "Experts a token runs, by experience and layer.", draw)
    if tree["exits"] is not None:
        yield Picture("experts_and_exits", "Experts, early exits, and both: test data, chosen on validation.",
                      partial(_draw_exits, tree))  # fmt: skip


def _draw_curve(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for n, (key, name) in enumerate((("ffn_share", "of the networks"), ("share", "of the model"))):
        costs = [row["test"][key] for row in tree["curve"]]
        scores = [row["test"]["accuracy"] for row in tree["curve"]]
        axes.plot(costs, scores, label=f"cost {name}", **series_style(n))
    axes.axhline(tree["accuracy"]["dense"], color=MUTED, linestyle=":", linewidth=1.2, label="dense model")
    _label_cost_axes(axes)
    legend(figure, axes)


def _draw_perplexity(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for n, (of, name) in enumerate((("curve", tree["setting"]["gate"]), ("top_k", "top_k, the same routers"))):
        rows = [row["test"] for row in tree[of] if row["test"]["perplexity"] is not None]
        if rows:
            costs, scores = [row["macs_per_token"] for row in rows], [row["perplexity"] for row in rows]
            axes.plot(costs, scores, label=name, **series_style(n))
    axes.axhline(tree["perplexity"]["dense"], color=MUTED, linestyle=":", linewidth=1.2, label="dense model")
    axes.set_xlabel("MACs per token")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    legend(figure, axes)


def _draw_exits(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for n, (way, stops) in enumerate(tree["exits"]["curves"].items()):
        axes.plot([stop["share"] for stop in stops], [stop["accuracy"] for stop in stops], label=way, **series_style(n))
    axes.axhline(tree["accuracy"]["dense"], color=MUTED, linestyle=":", linewidth=1.2, label="dense model")
    _label_cost_axes(axes)
    legend(figure, axes)


def _draw_by_layer(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    name = "k" if "k" in tree["setting"] else "tau"
    curve = tree["curve"]
    few = [curve[at] for at in sorted({round(step * (len(curve) - 1) / 4) for step in range(5)})]
    numbers = range(1, len(tree["layers"]) + 1)
    for n, row in enumerate(few):
        experts = [nan if each is None else each for each in row["test"]["experts"]]
        axes.plot(numbers, experts, label=f"{name} {row[name]:.3g}", **series_style(n))
    axes.set_xlabel("layer")
    axes.set_ylabel("experts per token")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)


def _draw_routers(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    layers = tree["layers"]
    shares = [layer["router_share"] for layer in layers]
    axes.barh(range(len(layers)), shares, color=series_style(0)["color"])
    axes.set_yticks(range(len(layers)), [_short_name(layer["name"]) for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("router's MACs in % of the dense network's")
    percent(axes.xaxis)


def _draw_heatmap(
    values: Sequence[Sequence[float | None]], names: Sequence[str], layers: Sequence[str], what: str, figure: Any
) -> None:
    axes = figure.subplots()
    grid = [[nan if value is None else value for value in row] for row in values]
    highest = max((value for row in values for value in row if value is not None), default=1.0)
    draw_heat_map(axes, grid, rows=names, columns=layers, highest=highest)
    axes.set(ylabel=what, title="experts per token")
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="x", rotation=40)


def _label_cost_axes(axes: Any) -> None:
    axes.set_xlabel(SHARE)
    axes.set_ylabel("accuracy in %")
    axes.set_xlim(left=0)
    percent(axes.xaxis)
    percent(axes.yaxis)


def _figure_height(tree: Mapping[str, Any]) -> float:
    return max(2.4, 0.9 + 0.16 * len(tree["layers"]))


def _short_name(name: str) -> str:
    """Last components of a layer's name."""
    parts = [part for part in name.split(".") if part not in ("backbone", "stages", "embed", "encoder", "layer")]
    return label(".".join(parts[-3:]), most=24)
