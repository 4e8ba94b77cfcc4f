"""Figures of a conversion, from the content of moefy.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import nan
from typing import Any

from clframe.reporting.report.drawing import INK, MUTED, Picture, label, legend, look, percent

SHARE = "cost in % of the dense model's"


def pictures(tree: Mapping[str, Any]) -> Iterator[Picture]:
    """Accuracy against cost, experts per token by layer, class and experience, and the routers' cost."""
    text = "Accuracy against cost as the gate's setting moves, on test data."
    yield Picture("accuracy_cost", text, partial(_curve, tree))
    yield Picture("experts_by_layer", "Experts a token runs, by layer, at each setting.", partial(_by_layer, tree))
    text = "The router's cost in % of its dense network's."
    yield Picture("router_share", text, partial(_routers, tree), _tall(tree))
    used = tree["experts_per_token"]
    layers = [_short(name) for name in used["layers"]]
    if used["by_class"]:
        draw = partial(_heat, used["by_class"], [str(c) for c in used["classes"]], layers, "class")
        yield Picture("experts_by_class", "Experts a token runs, by class and layer.", draw, 3.6)
    if used["by_experience"]:
        names = [str(e) for e in range(len(used["by_experience"]))]
        draw = partial(_heat, used["by_experience"], names, layers, "experience")
        yield Picture("experts_by_experience", "Experts a token runs, by experience and layer.", draw)
    if tree["exits"] is not None:
        yield Picture("experts_and_exits", "Experts, early exits, and both: test data, chosen on validation.",
                      partial(_exits, tree))  # fmt: skip


def _curve(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for n, (key, name) in enumerate((("ffn_share", "of the networks"), ("share", "of the model"))):
        costs = [row["test"][key] for row in tree["curve"]]
        scores = [row["test"]["accuracy"] for row in tree["curve"]]
        axes.plot(costs, scores, label=f"cost {name}", **look(n))
    axes.axhline(tree["accuracy"]["dense"], color=MUTED, linestyle=":", linewidth=1.2, label="dense model")
    _costs(axes)
    legend(figure, axes)


def _exits(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for n, (way, stops) in enumerate(tree["exits"]["curves"].items()):
        axes.plot([stop["share"] for stop in stops], [stop["accuracy"] for stop in stops], label=way, **look(n))
    axes.axhline(tree["accuracy"]["dense"], color=MUTED, linestyle=":", linewidth=1.2, label="dense model")
    _costs(axes)
    legend(figure, axes)


def _by_layer(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    name = "k" if "k" in tree["setting"] else "tau"
    curve = tree["curve"]
    few = [curve[at] for at in sorted({round(step * (len(curve) - 1) / 4) for step in range(5)})]
    numbers = range(1, len(tree["layers"]) + 1)
    for n, row in enumerate(few):
        experts = [nan if each is None else each for each in row["test"]["experts"]]
        axes.plot(numbers, experts, label=f"{name} {row[name]:.3g}", **look(n))
    axes.set_xlabel("layer")
    axes.set_ylabel("experts per token")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)


def _routers(tree: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    layers = tree["layers"]
    shares = [layer["router_share"] for layer in layers]
    axes.barh(range(len(layers)), shares, color=look(0)["color"])
    axes.set_yticks(range(len(layers)), [_short(layer["name"]) for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("router's MACs in % of the dense network's")
    percent(axes.xaxis)


def _heat(
    values: Sequence[Sequence[float | None]], names: Sequence[str], layers: Sequence[str], what: str, figure: Any
) -> None:
    axes = figure.subplots()
    grid = [[nan if value is None else value for value in row] for row in values]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.grid(False)
    every = max(1, -(-len(names) // 12))
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    step = max(1, -(-len(layers) // 12))
    axes.set_xticks(range(0, len(layers), step), layers[::step], rotation=40, ha="right", fontsize=7)
    axes.set_ylabel(what)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("experts per token", color=INK)


def _costs(axes: Any) -> None:
    axes.set_xlabel(SHARE)
    axes.set_ylabel("accuracy in %")
    axes.set_xlim(left=0)
    percent(axes.xaxis)
    percent(axes.yaxis)


def _tall(tree: Mapping[str, Any]) -> float:
    return max(2.4, 0.9 + 0.16 * len(tree["layers"]))


def _short(name: str) -> str:
    """The end of a layer's name."""
    parts = [part for part in name.split(".") if part not in ("backbone", "stages", "embed", "encoder", "layer")]
    return label(".".join(parts[-3:]), most=24)
