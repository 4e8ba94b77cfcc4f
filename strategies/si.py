"""Synaptic intelligence: penalize changes of the weights that reduced the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import to_single
from clframe.moe.usage import neuron_orders, reorder_values
from clframe.nn.network import Network
from clframe.regularization.importance import flatten, path_importance, quadratic
from clframe.regularization.penalties import QuadraticPenalty


@dataclass(frozen=True, kw_only=True)
class SI(Component):
    """Synaptic intelligence (SI): penalize changes of each weight by how much it reduced the loss while it was learned.

    Adds ``c * sum_p O_p (w_p - w*_p)^2``, ``w*`` the weights after the last experience. ``O_p`` grows with each
    experience by ``path_p / (moved_p^2 + damping)`` and is clipped at zero. ``path_p = -sum_t g_p(t) (w_p(t + 1) -
    w_p(t))`` follows the actual updates, whatever the optimizer; a step that moves no weight, such as one that a loss
    scaler skips, adds nothing. ``moved_p`` is the distance of the weight along that path. There is one penalty for
    the whole network, since one path minimizes the weighted loss of all exits; new rows of a classifier are free.

    Use it if no samples may be stored and a pass over the data after each experience is too expensive. Cost: five
    numbers per weight during training, two between experiences, and a few operations over the flat weights per step; no
    additional forward pass. Zenke et al., "Continual Learning Through Synaptic Intelligence" (2017).

    Args:
        c: Weight of the penalty; 0.1 to 1 in the paper.
        damping: Bounds the importance of weights that hardly moved; 0.001 to 0.1 in the paper.
        path: Gradient along the path: ``task`` excludes the penalty's gradient, as in the paper; ``total`` includes it,
            as many implementations do. If the gradient was clipped, or the owner of the slot ``loss_mix`` scaled the
            penalty, ``task`` subtracts the unscaled penalty.
        ceiling: Largest importance; none leaves them unbounded. Training by SGD diverges if learning rate * 2 c *
            importance exceeds 2.
    """

    name: ClassVar[str] = "si"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    remembers_weights: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    weight: ClassVar[str] = "c"

    c: float = 0.1
    damping: float = 0.1
    path: Literal["task", "total"] = "task"
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        if not self.c >= 0:
            raise ConfigError(f"components.si.c: found {self.c}; give a number of at least 0")
        if not self.damping > 0:
            raise ConfigError(f"components.si.damping: found {self.damping}; give a number above 0")
        _ = self._penalty  # built here so that an invalid ceiling is refused at construction

    @cached_property
    def _penalty(self) -> QuadraticPenalty:
        return QuadraticPenalty(owner=self.name, weight=self.weight, scope="total", ceiling=self.ceiling)

    def init_state(self, network: Network) -> State:
        """Return a state without penalty."""
        return self._penalty.empty()

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Resize the penalty to the grown classifiers and start a new path."""
        state = self._penalty.resize(network, state)
        start_P = to_single(flatten(state["live"]))
        path = {"start": start_P, "latest": start_P.clone(), "path": torch.zeros_like(start_P)}
        return {**state, **path, "orders": neuron_orders(network)}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the penalty, from the second experience on."""
        return self._penalty.losses(state, scale=self.c)

    def after_step(self, network: Network, step: Step, state: State) -> State:
        """Accumulate minus gradient times step along the path."""
        live, latest_P = state["live"], state["latest"]
        gradient_P = to_single(flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in live]))
        if self.path == "task" and state["terms"]:
            (term,) = state["terms"]
            gradient_P.sub_(2 * self.c * term["importance"] * (latest_P - term["center"]))
        now_P = to_single(flatten(live))
        step_P = now_P - latest_P
        # A step that the loss scaler of 16-mixed skips leaves infinite gradients behind, and infinity times 0 is NaN.
        gradient_P.masked_fill_(step_P == 0, 0)
        state["path"].addcmul_(gradient_P, step_P, value=-1)
        latest_P.copy_(now_P)
        return state

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Compute importances from the path and store the current weights."""
        live, (names,) = state["live"], state["scopes"]
        old_P = state["terms"][0]["importance"] if state["terms"] else torch.zeros_like(state["path"])
        path_P, start_P, end_P = (
            reorder_values(network, names, state[key], state["orders"]) for key in ("path", "start", "latest")
        )
        moved_P = end_P - start_P  # along the path: other components may have changed the network since its end
        found_P = path_importance(old_P, path_P, moved_P, damping=self.damping)
        parts = found_P.split([parameter.numel() for parameter in live])
        importances = [dict(zip(names, parts, strict=True))]
        return self._penalty.consolidate(
            network, state, importances, combine=lambda _, new_P, at_P: quadratic(new_P, at_P)
        )
