"""Activation sparsity: fewer neurons that fire, so that fewer need computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.network import Network
from clframe.sparsity.functional import displaced, hoyer, l1
from clframe.sparsity.penalties import MEASURED, swap_for_relu, watch
from clframe.sparsity.sites import find_sites


@dataclass(frozen=True, kw_only=True)
class Sparsity(Component):
    """Activation sparsity (D2DMoE, step 2): a penalty that leaves few neurons of every hidden layer active.

    Adds ``w(e) weight mean_layers mean_tokens H`` with ``H = ||a||_1^2 / ||a||_2^2`` of a token's hidden activations a:
    1 where one neuron fires, their number where all do alike, 0 where none does. It acts on the hidden layers of all
    feed-forward networks (of gated ones on the gate), which are found by their role; where there are none, on every
    ReLU-like activation, each position of a map being a token.

    Use it before a network is converted to experts, or to see what sparsity does to forgetting. Costs a pass over
    the activations at each layer, and nothing at inference. Tokens of padding count like others. H is not divided by
    the number of neurons, so weights that suit one width suit another twice as wide with half the value.
    Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024).

    Args:
        strength: Weight of the penalty. Published, for 90 epochs of ViT-B at a learning rate of 2e-5: 0.2; with
            ``l1`` for GPT-2: 5e-4; gated networks: 1e-4 to 1e-3. 0.003 is the largest of seven whose accuracy on
            held-out data stays within one standard error of none: small networks trained from scratch on digits and
            MNIST go from 46-55 to 66-77 % zeros for 0.3 points; 0.01 makes 72-84 % for 1 point, 0.03 77-91 % for 3.
        regularizer: ``hoyer``; ``l1``: ``||a||_1``; ``displaced`` and ``displaced_l1``: the same of
            ``max(pre, by) - by``, the pre-activations' distance above a point where GELU is flat, for networks that
            keep it.
        by: The point of ``displaced``.
        relu: Whether activations become ReLU, as published for ``hoyer``; GELU and SiLU are never exactly 0.
        schedule: How the strength goes over the epochs of an experience: ``constant``; ``linear``, up to its value in
            the last one; ``warmup``, linear up to its value at half of them.
        layers: Weights of the layers in order of depth, beside ``strength``; none: 1 each.
    """

    name: ClassVar[str] = "sparsity"
    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    weight: ClassVar[str] = "strength"

    strength: float = 0.003
    regularizer: Literal["hoyer", "l1", "displaced", "displaced_l1"] = "hoyer"
    by: float = -10.0
    relu: bool = False
    schedule: Literal["constant", "linear", "warmup"] = "constant"
    layers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse weights below 0, and a displacement that would cut off neurons that fire."""
        for key, ok, advice in (
            ("strength", self.strength >= 0, "give a number of at least 0"),
            ("by", self.by < 0, "give a number below 0"),
            ("layers", all(value >= 0 for value in self.layers), "give numbers of at least 0"),
        ):
            if not ok:
                raise ConfigError(f"components.sparsity.{key}: found {getattr(self, key)}; {advice}")

    def setup_network(self, network: Network) -> None:
        """Swap activations, and watch them."""
        if self.relu:
            swap_for_relu(network.backbone)
        sites = find_sites(network.backbone)
        if self.layers and len(self.layers) != len(sites):
            raise ConfigError(
                f"components.sparsity.layers: found {len(self.layers)} weights for {len(sites)} layers "
                f"({', '.join(site.name for site in sites)}); give one each, or none"
            )
        lost = [site.name for site in sites if site.fused or getattr(site.module, "inplace", False)]
        if lost and self.regularizer.startswith("displaced"):
            raise UnsupportedError(
                f"components.sparsity.regularizer: found {self.regularizer} with '{lost[0]}', which does not keep its "
                f"pre-activations; use hoyer or l1"
            )
        watch(network, sites, self.measure)

    def measure(self, pre_TN: Tensor, fired_TN: Tensor) -> Tensor:
        """The penalty of one layer, a scalar."""
        x_TN = displaced(pre_TN, by=self.by) if self.regularizer.startswith("displaced") else fired_TN
        return l1(x_TN) if self.regularizer.endswith("l1") else hoyer(x_TN)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The mean penalty over layers; exits have no part in it."""
        value_L = step.output.taps[MEASURED]
        if self.layers:
            value_L = torch.stack([weight * value for weight, value in zip(self.layers, value_L.unbind(), strict=True)])
        return {"penalty": self.strength * self._ramp(step) * value_L.mean()}

    def _ramp(self, step: Step) -> float:
        """The share of the strength in this epoch."""
        share = (step.context.epoch + 1) / step.context.epochs
        return {"constant": 1.0, "linear": share, "warmup": min(1.0, 2 * share)}[self.schedule]
