"""The figures of a run's exits, for TensorBoard and the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clframe.metrics.exit_record import ExitRecord
from clframe.training.drawings import curve_image, exit_accuracy_image, heat_image, who_answers_image

if TYPE_CHECKING:
    from clframe.training.drawings import Picture

MOST_CURVES = 5
"""Curves of earlier experiences drawn beside the newest one's."""


def exit_images(records: Sequence[ExitRecord], *, names: Sequence[str]) -> dict[str, Picture]:
    """Pictures (height, width, 3) by name, given the records after every training experience so far.

    ``curve``: accuracy against cost after the newest experience and some before it; ``accuracy``: each exit alone,
    over experiences; ``who_answers``: the share of each exit at each budget, after the newest; ``similarity``:
    each exit's tap compared with itself after the first experience.
    """
    experiences = [f"{i}" for i in range(len(records))]
    step = -(-len(records) // MOST_CURVES)
    drawn = [i for i in range(len(records)) if (len(records) - 1 - i) % step == 0]
    curves = {f"after experience {i}": records[i].curve for i in drawn}
    newest = f"after experience {len(records) - 1}"
    images = {
        "curve": curve_image(curves, points={newest: records[-1].points}),
        "accuracy": exit_accuracy_image([record.diagnostics.accuracy_K for record in records], names=names),
        "similarity": heat_image(
            [[record.similarity_K[k] for record in records] for k in range(len(names))],
            rows=names, columns=experiences, title="similarity of each exit's tap (CKA)",
        ),
    }  # fmt: skip
    if records[-1].share_PK:
        labels = [point.name for point in records[-1].points.points or ()]
        images["who_answers"] = who_answers_image(records[-1].share_PK, names=names, labels=labels)
    return images
