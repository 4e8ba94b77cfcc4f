"""Copy weights with re-init (CWR*): train only the rows of new classes and consolidate them separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.core.component import Component
from clframe.core.types import Experience, State, StepContext
from clframe.exits.features import heads_with_rows, read_rows, rows_and_fresh, write_rows
from clframe.functional.prototypes import consolidate_rows
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class CWR(Component):
    """Copy weights with re-init (CWR*): start each experience with empty classifiers and consolidate the trained rows.

    While an experience is trained, every exit's linear classifier holds only the rows of its classes, the consolidated
    ones for classes seen before and zero otherwise. Afterwards they are centered at zero and averaged into the
    consolidated weights, ``w <- (w r + t - mean(t)) / (r + 1)``, ``r = sqrt(past / now)`` samples, which are then
    copied into the classifier. Biases are treated the same way. Lomonaco et al., "Rehearsal-Free Continual Learning
    over Small Non-I.I.D. Batches" (2020).

    Use it for long streams of small experiences on a backbone that changes little. Cost: one copy of the classifiers
    and no stored samples; with a frozen backbone a step is cheaper than plain training. Limits: only the last linear
    layer of a head is consolidated. Earlier layers of exit heads, cascades included, are frozen with the backbone; if
    it is free, consolidated rows become outdated. Rows trained on replayed samples are discarded. Cosine classifiers
    are unchanged.

    Args:
        backbone: ``frozen`` after the first experience, that is everything except the linear classifiers and heads
            added by an experience; or ``free``, trained further.
    """

    name: ClassVar[str] = "cwr"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    changes_network: ClassVar[bool] = True

    backbone: Literal["frozen", "free"] = "frozen"

    def init_state(self, network: Network) -> State:
        """Return a state without consolidated rows."""
        return {"rows": {}}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Load the consolidated rows of this experience's classes, zero for all others."""
        for exit, head in heads_with_rows(network):
            weight_CF, bias_C = (torch.zeros_like(part) for part in read_rows(head))
            if exit in state["rows"]:
                kept = self._resize(state["rows"][exit], len(bias_C))
                now = list(context.experience.classes)
                weight_CF[now], bias_C[now] = kept["weight"][now], kept["bias"][now]
            write_rows(head, weight_CF, bias_C)
        return state

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Freeze parameters before other components collect trainable ones."""
        if self.backbone == "free" or experience.index == 0:
            return
        network.backbone.requires_grad_(False)
        for _, head in heads_with_rows(network):
            head.requires_grad_(False)
            for parameter in rows_and_fresh(head, experience.past):
                parameter.requires_grad_(True)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze again, since every epoch starts in training mode."""
        self.add_classes(network, context.experience)
        if self.backbone == "frozen" and context.experience.index > 0:
            network.backbone.eval()

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Consolidate the trained rows and copy all consolidated rows into the classifiers."""
        y_N = context.experience.samples.y.to(network.final.weight.device)
        rows = {}
        for exit, head in heads_with_rows(network):
            weight_CF, bias_C = read_rows(head)
            count_C = torch.bincount(y_N, minlength=len(bias_C))
            kept = self._resize(state["rows"].get(exit, {}), len(bias_C), like=weight_CF)
            weight_CF, total_C = consolidate_rows(kept["weight"], kept["count"], weight_CF, count_C)
            bias_C1, _ = consolidate_rows(kept["bias"][:, None], kept["count"], bias_C[:, None], count_C)
            rows[exit] = {"weight": weight_CF, "bias": bias_C1[:, 0], "count": total_C}
            write_rows(head, weight_CF, bias_C1[:, 0])
        return {"rows": rows}

    def _resize(self, kept: Mapping[str, Tensor], classes: int, *, like: Tensor | None = None) -> Mapping[str, Any]:
        """Return consolidated rows with zeros for classes added since."""
        if not kept:
            assert like is not None
            count_C = torch.zeros(classes, dtype=torch.long, device=like.device)
            return {"weight": torch.zeros_like(like), "bias": like.new_zeros(classes), "count": count_C}
        added = classes - len(kept["bias"])
        return {
            "weight": F.pad(kept["weight"], (0, 0, 0, added)),
            "bias": F.pad(kept["bias"], (0, added)),
            "count": F.pad(kept["count"], (0, added)),
        }
