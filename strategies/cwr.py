"""Copy weights with re-init (CWR*): train the rows of the new classes alone, keep the old ones aside."""

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
from clframe.functional.prototypes import consolidated_rows
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class CWR(Component):
    """Copy weights with re-init (CWR*): classifiers start each experience empty; trained rows are kept aside.

    While an experience is trained, every exit's linear classifier holds only the rows of its classes, the consolidated
    ones where they were met before and zero elsewhere. Afterwards they are centered at zero and averaged into
    the consolidated weights, ``w <- (w r + t - mean(t)) / (r + 1)``, ``r = sqrt(past / now)`` samples, which the
    classifier then takes. Biases are treated alike. For long streams of small experiences on a backbone that
    changes little. Lomonaco et al., "Rehearsal-Free Continual Learning over Small Non-I.I.D. Batches" (2020).

    Costs one copy of the classifiers and no memory of samples; with a frozen backbone a step is cheaper than plain
    training. Limits: it knows the last linear layer of a head only. Earlier layers of exits' heads are frozen with
    the backbone, cascades included; if it is free, rows kept aside age with it. Replayed samples train rows
    that are thrown away. Cosine classifiers are left as they are.

    Args:
        backbone: ``frozen`` after the first experience, everything but the linear classifiers and the heads that an
            experience adds; or ``free``, learning on.
    """

    name: ClassVar[str] = "cwr"

    backbone: Literal["frozen", "free"] = "frozen"

    def init_state(self, network: Network) -> State:
        """No rows kept."""
        return {"rows": {}}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Rows of this experience's classes as they were kept, zero for all others."""
        for exit, head in heads_with_rows(network):
            weight_CF, bias_C = (torch.zeros_like(part) for part in read_rows(head))
            if exit in state["rows"]:
                kept = self._sized(state["rows"][exit], len(bias_C))
                now = list(context.experience.classes)
                weight_CF[now], bias_C[now] = kept["weight"][now], kept["bias"][now]
            write_rows(head, weight_CF, bias_C)
        return state

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Hold still what is frozen, before other components look at what learns."""
        if self.backbone == "free" or experience.index == 0:
            return
        network.backbone.requires_grad_(False)
        for _, head in heads_with_rows(network):
            head.requires_grad_(False)
            for parameter in rows_and_fresh(head, experience.past):
                parameter.requires_grad_(True)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Done anew in every epoch, since training mode comes back with each."""
        self.add_classes(network, context.experience)
        if self.backbone == "frozen" and context.experience.index > 0:
            network.backbone.eval()

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Consolidate the trained rows and put all that are kept in place."""
        y_N = context.experience.samples.y.to(network.final.weight.device)
        rows = {}
        for exit, head in heads_with_rows(network):
            weight_CF, bias_C = read_rows(head)
            count_C = torch.bincount(y_N, minlength=len(bias_C))
            kept = self._sized(state["rows"].get(exit, {}), len(bias_C), like=weight_CF)
            weight_CF, total_C = consolidated_rows(kept["weight"], kept["count"], weight_CF, count_C)
            bias_C1, _ = consolidated_rows(kept["bias"][:, None], kept["count"], bias_C[:, None], count_C)
            rows[exit] = {"weight": weight_CF, "bias": bias_C1[:, 0], "count": total_C}
            write_rows(head, weight_CF, bias_C1[:, 0])
        return {"rows": rows}

    def _sized(self, kept: Mapping[str, Tensor], classes: int, *, like: Tensor | None = None) -> Mapping[str, Any]:
        """What is kept, with zeros for classes that came later."""
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
