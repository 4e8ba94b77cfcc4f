"""Low-rank adaptation: train small adapters of linear layers while the backbone is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from clframe.core.component import Component
from clframe.core.types import Experience, State, StepContext
from clframe.errors import ConfigError
from clframe.nn.low_rank import AdaptedLinear, adapt_layers
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class LoRA(Component):
    """Low-rank adaptation (LoRA): after the first experiences, train low-rank adapters of linear layers only.

    An adapted layer computes ``(W + alpha / r B A) x``, with W frozen, B of r columns and A of r rows; the rest of the
    backbone is frozen too, and classifiers with their own weights are trained. Hu et al., "LoRA: Low-Rank Adaptation of
    Large Language Models" (2022).

    Use it for backbones that are large, pre-trained, or have learned enough in the first experiences: what an
    experience can change is limited to rank r. It costs ``r (inputs + outputs)`` weights and MACs per layer, and in
    training less memory for gradients and optimizer.

    Args:
        targets: Last parts of the names of the linear layers to adapt, such as ``q_proj``, ``k_proj``, ``v_proj``,
            ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj`` of the backbone decoder; empty: all of the backbone.
        rank: r.
        alpha: Scale of the adapters, divided by r.
        after: Number of experiences in which the whole network is trained, without adapters; 0 for pre-trained ones.
        merge: ``experience``: adapters are added to the weights at the end of every experience, and new ones start at
            zero; ``never``: one adapter per layer is trained in all experiences and remains separate.
    """

    name: ClassVar[str] = "lora"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    targets: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    after: int = 1
    merge: Literal["experience", "never"] = "experience"

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("targets", len(set(self.targets)) == len(self.targets), "name each layer once"),
            ("rank", self.rank >= 1, "give at least 1"),
            ("alpha", self.alpha > 0, "give a number above 0"),
            ("after", self.after >= 0, "give a number of at least 0"),
        ):
            if not ok:
                raise ConfigError(f"components.lora.{key}: found {getattr(self, key)}; {advice}")

    @property
    def renews_weights(self) -> bool:
        """Whether every experience has new adapters."""
        return self.merge == "experience"

    def setup_network(self, network: Network) -> None:
        """Replace the layers by adapted ones, whose adapters are zero."""
        adapt_layers(
            network.backbone, self.targets, rank=self.rank, alpha=self.alpha, where=f"components.{self.name}"
        )
        for layer in _adapted(network):
            layer.active = self.merge == "never" and self.after == 0
            _train_adapter(layer, wanted=False)

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Freeze the backbone and start the adapters, before other components collect trainable parameters."""
        if experience.index < self.after:
            return
        if self.merge == "experience" or experience.index == self.after:
            for layer in _adapted(network):
                layer.draw()
        self._freeze(network)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze again what another component has released."""
        if context.experience.index >= self.after:
            self._freeze(network)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Merge the adapters."""
        if context.experience.index >= self.after and self.merge == "experience":
            for layer in _adapted(network):
                layer.merge()
        return state

    def _freeze(self, network: Network) -> None:
        network.backbone.requires_grad_(False)
        for layer in _adapted(network):
            _train_adapter(layer, wanted=True)


def _adapted(network: Network) -> list[AdaptedLinear]:
    return [part for part in network.backbone.modules() if isinstance(part, AdaptedLinear)]


def _train_adapter(layer: AdaptedLinear, *, wanted: bool) -> None:
    layer.down_RI.requires_grad_(wanted)
    layer.up_OR.requires_grad_(wanted)
