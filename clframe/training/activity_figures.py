"""The figure of what hidden neurons do, for TensorBoard and the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clframe.metrics.activity_record import ActivityRecord
from clframe.training.drawings import triangles_image

if TYPE_CHECKING:
    from clframe.training.drawings import Picture


def activity_image(records: Sequence[ActivityRecord]) -> Picture | None:
    """Which active neurons stay and which are shared, means over layers, given the records so far.

    Left, each experience's active neurons compared with those when it was learnt; right, those of each experience, as
    it was learnt, with those of earlier ones at that time. None before the second experience and for a network without
    hidden neurons.
    """
    if len(records) < 2 or not records[-1].layers:
        return None
    return triangles_image(
        {
            "active neurons kept since learnt": [record.kept_E for record in records],
            "active neurons shared with the newest": [record.overlap_E for record in records],
        }
    )


def short(layer: str, *, most: int = 28) -> str:
    """A layer's name, its end where it is long; the whole model has none.

    >>> short("backbone.stages.3.mlp", most=12), short("")
    ('..ages.3.mlp', 'model')
    """
    if not layer:
        return "model"
    return layer if len(layer) <= most else f"..{layer[2 - most:]}"
