"""TensorBoard's Custom Scalars page, with charts that are not smoothed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Chart(NamedTuple):
    """Curves of one chart.

    Attributes:
        tags: Tags of exact curves; regular expressions for tags of smoothed ones.
        smoothed: Whether TensorBoard smooths the curves, by its own setting, which is 0.6 at first.
    """

    tags: Sequence[str]
    smoothed: bool = False


def page(categories: Mapping[str, Mapping[str, Chart]]) -> Any:
    """Return the page as a summary: charts by title, in categories by title.

    TensorBoard smooths every chart except those of margins, which have a curve between a lower and an upper one. A
    margin of three equal curves is an exact curve, with a marker at every value.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import custom_scalars

    def chart(title: str, content: Chart) -> Any:
        if content.smoothed:
            return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=content.tags))
        margin = layout_pb2.MarginChartContent
        series = [margin.Series(value=tag, lower=tag, upper=tag) for tag in content.tags]
        return layout_pb2.Chart(title=title, margin=margin(series=series))

    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=category, chart=[chart(title, content) for title, content in charts.items()])
            for category, charts in categories.items()
        ]
    )
    untyped: Any = custom_scalars  # writes one series per margin, so only its envelope is used
    summary = untyped({})
    summary.value[0].tensor.string_val[0] = layout.SerializeToString()
    return summary
