"""Synaptic intelligence: hold the weights that brought the loss down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.moe.usage import followed, neuron_orders
from clframe.nn.network import Network
from clframe.regularization.importance import flat, path_importance, quadratic
from clframe.regularization.penalties import consolidated, held, taken_up, unconsolidated
from clframe.regularization.sensitivity import objectives


@dataclass(frozen=True, kw_only=True)
class SI(Component):
    """Synaptic intelligence (SI): hold each weight as hard as it helped to bring the loss down while it learnt.

    Adds ``c * sum_p O_p (w_p - w*_p)^2``, ``w*`` the weights after the last experience. ``O_p`` grows with each
    experience by ``path_p / (moved_p^2 + damping)`` and is cut at zero: ``path_p = -sum_t g_p(t) (w_p(t + 1) -
    w_p(t))`` follows the updates as they were made, whatever the optimizer, ``moved_p`` is how far the weight went
    in the experience. One penalty for the whole network, since one path minimizes the weighted loss of all exits;
    new rows of a classifier are free. For when nothing may be stored and a pass over the data afterwards costs too
    much. Zenke et al., "Continual Learning Through Synaptic Intelligence" (2017).

    Costs five numbers a weight while training, two between experiences, and at every step a few operations over the
    flat weights; no extra passes.

    Args:
        c: Weight of the penalty; 0.1 to 1 in the paper.
        damping: Keeps weights that hardly moved from mattering without bound; 0.001 to 0.1 in the paper.
        path: Whose gradient the path is along: ``task`` leaves the penalty's own out, as the paper does; ``total``
            keeps it in, as many implementations do. Where the gradient was clipped, or the owner of the slot
            ``mix`` scaled the penalty, ``task`` takes out what the penalty had been before.
        ceiling: Largest importance; none leaves them as they are. Training by SGD diverges where learning rate *
            2 c * importance passes 2.
    """

    name: ClassVar[str] = "si"
    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    weight: ClassVar[str] = "c"

    c: float = 0.1
    damping: float = 0.1
    path: Literal["task", "total"] = "task"
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Refuse a negative weight and a damping that divides by zero."""
        if not self.c >= 0:
            raise ConfigError(f"components.si.c: found {self.c}; give a number of at least 0")
        if not self.damping > 0:
            raise ConfigError(f"components.si.damping: found {self.damping}; give a number above 0")
        if self.ceiling is not None and not self.ceiling > 0:
            raise ConfigError(f"components.si.ceiling: found {self.ceiling}; give a number above 0, or none")

    def init_state(self, network: Network) -> State:
        """Nothing is held before the first experience ends."""
        return unconsolidated()

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """What is held, in the shapes of the grown classifiers, and a path that begins here."""
        state = taken_up(network, state, objectives(network, scope="total"))
        start_P = flat(state["live"])
        path = {"start": start_P, "latest": start_P.clone(), "path": torch.zeros_like(start_P)}
        return {**state, **path, "orders": neuron_orders(network)}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The penalty, from the second experience on."""
        return {"penalty": self.c * held(state).sum()} if state["terms"] else {}

    def after_step(self, network: Network, step: Step, state: State) -> None:
        """Follow the path: minus gradient times step, added up."""
        live, latest_P = state["live"], state["latest"]
        gradient_P = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in live])
        if self.path == "task" and state["terms"]:
            (term,) = state["terms"]
            gradient_P.sub_(2 * self.c * term["importance"] * (latest_P - term["center"]))
        now_P = flat(live)
        state["path"].addcmul_(gradient_P, now_P - latest_P, value=-1)
        latest_P.copy_(now_P)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Importances from the path, and the weights as they are now."""
        live, (names,) = state["live"], state["scopes"]
        old_P = state["terms"][0]["importance"] if state["terms"] else torch.zeros_like(state["path"])
        path_P, start_P = (followed(network, names, state[key], state["orders"]) for key in ("path", "start"))
        moved_P = flat(live) - start_P
        found_P = path_importance(old_P, path_P, moved_P, damping=self.damping)
        parts = found_P.split([parameter.numel() for parameter in live])
        importances = [dict(zip(names, parts, strict=True))]
        return consolidated(
            network,
            state,
            importances,
            combine=lambda _, new_P, at_P: quadratic(new_P, at_P),
            ceiling=self.ceiling,
            where="components.si.c",
        )
