"""Names on TensorBoard: the tags of the first page, what counts in training steps, and the Custom Scalars page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PROGRESS = "1_progress"
"""The group that answers how it is going; TensorBoard sorts by name, digits first, and opens the first groups."""
PICTURES = "2_pictures"
"""The group of images behind it."""
LOSS = f"{PROGRESS}/loss"
"""Tag of the sum of all loss terms."""
THROUGHPUT = f"{PROGRESS}/samples_per_second"
"""Tag of the samples trained on a second."""
LEARNING_RATE = "train/learning_rate"
"""Tag of the learning rate."""

CHARTS: Mapping[str, Mapping[str, str]] = {
    "progress": {
        "accuracy over the experiences so far": rf"{PROGRESS}/accuracy$",
        "forgetting": rf"{PROGRESS}/forgetting$",
        "losses by term": r"loss/.+",
        "MACs of a prediction": rf"{PROGRESS}/macs_per_prediction$",
        "exits used": r"exits_used/.+",
        "inactive neurons by layer": r"sparsity/.+",
        "experts per token by layer": r"experts_per_token/.+",
        "samples per second": rf"{THROUGHPUT}$",
    },
    "experiences": {
        "accuracy per experience": r"experience_accuracy/\d+$",
        "active neurons kept since learnt": r"neurons_kept/.+",
        "active neurons shared with earlier experiences": r"neurons_shared/.+",
        "task-aware accuracy and backward transfer": r"continual/.+",
    },
    "exits": {
        "accuracy per exit": r"exit_accuracy/.+",
        "forgetting per exit": r"exit_forgetting/.+",
        "decisions": r"exit_decision/.+",
        "accuracy at a share of the cost in %": r"exit_accuracy_at_cost/.+",
        "who answers at half the cost": r"exit_share_50/.+",
        "similarity of taps": r"exit_similarity/.+",
    },
    "training": {
        "learning rate": rf"{LEARNING_RATE}.*",
    },
}
"""Charts of the Custom Scalars page by category: a regular expression for their tags, matched from the start."""


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """The Custom Scalars page with those charts that have something to show, as ``SummaryWriter`` takes it.

    >>> layout(["loss/task/ce", "train/learning_rate"])["training"]
    {'learning rate': ['Multiline', ['train/learning_rate.*']]}
    """
    written = tuple(tags)
    found: dict[str, dict[str, list[object]]] = {}
    for category, charts in CHARTS.items():
        for title, pattern in charts.items():
            if any(re.match(pattern, tag) for tag in written):
                found.setdefault(category, {})[title] = ["Multiline", [pattern]]
    return found


def in_steps(tag: str) -> bool:
    """Whether a tag's x is the training step; it is the number of the experience otherwise."""
    return tag in (LOSS, THROUGHPUT) or tag.startswith(("loss/", "train/"))


def written_anew(tag: str) -> bool:
    """Whether a tag is one that every session of a run writes again: the layout, hyper-parameters, final metrics."""
    return tag.startswith(("custom_scalars__", "_hparams_/", "final/"))
