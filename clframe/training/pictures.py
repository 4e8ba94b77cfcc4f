"""Pictures of a run's results so far, which TensorBoard shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clframe.accounting import Predictions
from clframe.exits.diagnostics import ExitRecord
from clframe.exits.plots import exit_images, exit_usage_image
from clframe.plotting.images import confusion_image, matrix_image
from clframe.sparsity.activity import ActivityRecord
from clframe.sparsity.plots import activity_image

if TYPE_CHECKING:
    from clframe.metrics.continual import Matrix
    from clframe.plotting.style import PixelArray

PICTURES = "2_pictures"
"""The group of images, behind that of the progress."""


def draw_pictures(
    accuracy_TE: Matrix,
    *,
    names: Sequence[str],
    exits: Sequence[ExitRecord] = (),
    usage: Sequence[Sequence[float]] = (),
    activity: Sequence[ActivityRecord] = (),
    confusion: Sequence[Sequence[int]] = (),
    classes: Sequence[str] = (),
) -> dict[str, PixelArray]:
    """Draw what there is, by tag.

    Args:
        accuracy_TE: Accuracies so far.
        names: The exits' names, in order of depth.
        exits: One record per experience; not drawn for one exit.
        usage: share_TK from :func:`exit_usage`.
        activity: One record per experience.
        confusion: Samples by true and predicted class.
        classes: Names of these classes.
    """
    found = {f"{PICTURES}/accuracy_matrix": matrix_image(accuracy_TE)}
    if usage:
        found[f"{PICTURES}/exits_used"] = exit_usage_image(usage, names=names, title="exit usage")
    neurons = activity_image(activity) if activity else None
    if neurons is not None:
        found[f"{PICTURES}/neurons"] = neurons
    if len(names) > 1:
        for name, picture in exit_images(exits, names=names).items():
            found[f"{PICTURES}/accuracy_and_cost" if name == "curve" else f"exits/{name}"] = picture
    if confusion:
        found[f"{PICTURES}/confusion_matrix"] = confusion_image(confusion, names=classes)
    return found


def figures_of(pictures: Mapping[str, PixelArray]) -> dict[str, PixelArray]:
    """Return those pictures of :func:`draw_pictures` that are figures of a run folder as well, by the figures' names.

    >>> sorted(figures_of({"2_pictures/neurons": 0, "exits/accuracy": 1, "2_pictures/exits_used": 2}))
    ['exits_accuracy', 'neurons']
    """
    found = {"exits_curve": f"{PICTURES}/accuracy_and_cost"}
    found |= {name: f"{PICTURES}/{name}" for name in ("accuracy_matrix", "confusion_matrix", "neurons")}
    found |= {tag.replace("exits/", "exits_"): tag for tag in pictures if tag.startswith("exits/")}
    return {name: pictures[tag] for name, tag in found.items() if tag in pictures}


def exit_usage(costs: Predictions, *, names: Sequence[str], experiences: Sequence[int]) -> list[list[float]]:
    """Return the share of samples that stop at each exit, share_TK, of the experiences with samples."""
    counts: list[Mapping[str, int]] = [costs.samples_by_exit(experience=e) for e in experiences]
    return [[found.get(name, 0) / sum(found.values()) for name in names] for found in counts if any(found.values())]
