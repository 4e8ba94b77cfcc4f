"""Low-rank adaptation: train small adapters of linear layers while the backbone is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from clframe.core.component import Component
from clframe.core.types import Experience, State, StepContext
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.domain_adapters import DomainAdapters, adapted_layers
from clframe.nn.low_rank import AdaptedLinear, adapt_layers
from clframe.nn.network import Network

_OF_LOSSES = ("step_values", "task_loss", "losses", "combine_losses", "modify_gradients", "setup_network", "init_state")
"""Hooks that act on the losses of single steps."""


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
            zero; ``never``: one adapter per layer is trained in all experiences and remains separate; ``apart``: every
            experience trains adapters for itself, which are kept, so that nothing is forgotten (language models).
        choose: Adapters of a prediction with ``merge=apart``. ``likelihood``: for each token those under which the
            earlier tokens of its window are most likely, which takes a pass with the adapters of every experience;
            ``domain``: those of its experience, which evaluations then know (``benchmark.protocol=task_incremental``).
    """

    name: ClassVar[str] = "lora"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    targets: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    after: int = 1
    merge: Literal["experience", "never", "apart"] = "experience"
    choose: Literal["likelihood", "domain"] = "likelihood"

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
        if self.choose != "likelihood" and self.merge != "apart":
            raise ConfigError(
                f"components.lora.choose: found {self.choose} with merge={self.merge}, which has no adapters to choose "
                f"from; set merge=apart"
            )

    @property
    def renews_weights(self) -> bool:
        """Whether every experience has new adapters."""
        return self.merge != "never"

    @property
    def needs_domain_labels(self) -> str:
        """The option ``choose`` where it is ``domain``."""
        return "choose" if self.choose == "domain" else ""

    def conflict_with(self, other: Component) -> str:
        """Refuse with ``merge=apart`` what acts on more than the losses of an experience."""
        acts = [hook for hook in other.acts_at() if hook not in _OF_LOSSES]
        if self.merge != "apart" or not acts:
            return ""
        return (
            f"'{self.name}' with merge=apart has separate adapters for every experience, which '{other.name}' would "
            f"mix ({acts[0]}); leave it out, or use merge=experience"
        )

    def setup_network(self, network: Network) -> None:
        """Replace the layers by adapted ones, whose adapters are zero.

        Raises:
            UnsupportedError: ``merge=apart`` for a classifier.
        """
        apart = self.merge == "apart"
        if apart and not network.vocabulary:
            raise UnsupportedError(
                f"components.{self.name}.merge: found apart for a classifier, whose adapters cannot be chosen by the "
                f"likelihood of text; use experience or never"
            )
        adapt_layers(
            network.backbone, self.targets, rank=self.rank, alpha=self.alpha, where=f"components.{self.name}",
            keeps=apart,
        )  # fmt: skip
        for layer in adapted_layers(network):
            layer.active = self.merge == "never" and self.after == 0
            _train_adapter(layer, wanted=False)
        if apart:
            network.choice = DomainAdapters(self.name, after=self.after, known=self.choose == "domain")

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Freeze the backbone and start the adapters, before other components collect trainable parameters."""
        if experience.index < self.after:
            return
        if self.renews_weights or experience.index == self.after:
            for layer in adapted_layers(network):
                layer.draw()
        self._freeze(network)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze again what another component has released."""
        if context.experience.index >= self.after:
            self._freeze(network)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Merge the adapters, or keep them apart."""
        if context.experience.index >= self.after and self.renews_weights:
            for layer in adapted_layers(network):
                layer.merge() if self.merge == "experience" else layer.keep()
        return state

    def _freeze(self, network: Network) -> None:
        network.backbone.requires_grad_(False)
        for layer in adapted_layers(network):
            _train_adapter(layer, wanted=True)


def _train_adapter(layer: AdaptedLinear, *, wanted: bool) -> None:
    layer.down_RI.requires_grad_(wanted)
    layer.up_OR.requires_grad_(wanted)
