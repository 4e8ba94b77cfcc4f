"""Activation sparsity: reduce the number of active neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.network import Network
from clframe.sparsity.functional import displacement, hoyer, l1
from clframe.sparsity.penalties import MEASURED, measure_sites, swap_for_relu
from clframe.sparsity.sites import find_sites


@dataclass(frozen=True, kw_only=True)
class Sparsity(Component):
    """Activation sparsity (D2DMoE, step 2): penalize hidden activations so that few neurons of every layer stay active.

    Adds ``r(t) strength mean_layers mean_tokens H`` with ``H = ||a||_1^2 / ||a||_2^2`` of a token's hidden activations
    a: 1 if one neuron is active, the number of neurons if all are equally active, 0 if none is. It acts on the hidden
    layers of all feed-forward networks (of gated ones on the gate), which are found by their role; without any, on
    every ReLU-like activation, with each position of a map as a token. Szatkowski et al., "Exploiting Activation
    Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024).

    Use it before a network is converted to experts, or to study the effect of sparsity on forgetting. Cost: a pass over
    the activations at each layer, and nothing at inference. Padding tokens count like others. H is not divided by the
    number of neurons, so a network twice as wide needs half the strength.

    Args:
        strength: Weight of the penalty. Published, for 90 epochs of ViT-B at a learning rate of 2e-5: 0.2; with ``l1``
            for GPT-2: 5e-4; gated networks: 1e-4 to 1e-3. 0.003 is the largest of seven values whose accuracy on
            held-out data stays within one standard error of none: small networks trained from scratch on digits and
            MNIST increase from 46-55 to 66-77 % zeros at a loss of 0.3 points; 0.01 gives 72-84 % at 1 point, 0.03
            77-91 % at 3.
        regularizer: ``hoyer``; ``l1``: ``||a||_1``; ``displaced`` and ``displaced_l1``: the same of
            ``max(pre, by) - by``, the pre-activations' distance above a point where GELU is flat, for networks that
            keep it.
        by: The point of ``displaced``.
        relu: Whether to replace activations by ReLU, as published for ``hoyer``; GELU and SiLU are never exactly 0.
        schedule: Share r of the strength over an experience: ``constant``; ``linear``, up to 1 at its end; ``warmup``,
            linear up to 1 at half of it.
        ramp: Unit of the schedule: ``epoch``, from 1 / epochs in the first epoch (with one epoch per experience
            ``linear`` is constant); ``step``, from 0 at the first batch, raised with every batch as in the authors'
            code.
        layers: Relative weights of the layers in order of depth; none: 1 each.
    """

    name: ClassVar[str] = "sparsity"
    changes_activity: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    weight: ClassVar[str] = "strength"

    strength: float = 0.003
    regularizer: Literal["hoyer", "l1", "displaced", "displaced_l1"] = "hoyer"
    by: float = -10.0
    relu: bool = False
    schedule: Literal["constant", "linear", "warmup"] = "constant"
    ramp: Literal["epoch", "step"] = "epoch"
    layers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Validate the options; a displacement of 0 or more would cut off active neurons."""
        for key, ok, advice in (
            ("strength", self.strength >= 0, "give a number of at least 0"),
            ("by", self.by < 0, "give a number below 0"),
            ("layers", all(value >= 0 for value in self.layers), "give numbers of at least 0"),
        ):
            if not ok:
                raise ConfigError(f"components.sparsity.{key}: found {getattr(self, key)}; {advice}")

    def setup_network(self, network: Network) -> None:
        """Replace activations if asked to, and record the hidden ones."""
        if self.relu:
            swap_for_relu(network.backbone)
        sites = find_sites(network.backbone)
        if self.layers and len(self.layers) != len(sites):
            raise ConfigError(
                f"components.sparsity.layers: found {len(self.layers)} weights for {len(sites)} layers "
                f"({', '.join(site.name for site in sites)}); give one each, or none"
            )
        lost = [site.name for site in sites if site.overwrites]
        if lost and self.regularizer.startswith("displaced"):
            raise UnsupportedError(
                f"components.sparsity.regularizer: found {self.regularizer} with '{lost[0]}', which does not keep its "
                f"pre-activations; use hoyer or l1"
            )
        measure_sites(network, sites, self.layer_penalty)

    def layer_penalty(self, pre_TN: Tensor, fired_TN: Tensor) -> Tensor:
        """Return the penalty of one layer, a scalar."""
        x_TN = displacement(pre_TN, by=self.by) if self.regularizer.startswith("displaced") else fired_TN
        return l1(x_TN) if self.regularizer.endswith("l1") else hoyer(x_TN)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the mean penalty over layers, one value for all exits."""
        value_L = step.output.taps[MEASURED]
        if self.layers:
            value_L = torch.stack([weight * value for weight, value in zip(self.layers, value_L.unbind(), strict=True)])
        return {"penalty": step.values["strength"] * value_L.mean()}

    def step_values(self, context: StepContext, number: int, state: State) -> Mapping[str, float]:
        """Return the weight of the penalty at this step."""
        return {"strength": self.strength * self._ramp(context, number)}

    def _ramp(self, context: StepContext, number: int) -> float:
        """Return the share of the strength at this step."""
        share = (context.epoch + 1) / context.epochs
        if self.ramp == "step" and self.schedule != "constant":
            if not context.steps:
                raise UnsupportedError(
                    "components.sparsity.ramp: found step, but the loader in use has no length; use ramp epoch"
                )
            share = (context.epoch + number / context.steps) / context.epochs
        return {"constant": 1.0, "linear": share, "warmup": min(1.0, 2 * share)}[self.schedule]
