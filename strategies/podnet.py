"""PODNet: distill pooled feature maps, and classify by several proxies per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.exits.features import exit_embeddings
from clframe.functional.representation import Pooling, cosine_distance, nca, pod
from clframe.nn.backbones import Backbone
from clframe.nn.frozen import freeze
from clframe.nn.heads import CosineLinear
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class PODNet(Component):
    """Pooled outputs distillation (PODNet): distill sums of maps over rows and columns, and the direction of features.

    Adds ``sqrt(classes seen / new classes)`` times ``spatial`` x the distance of pooled maps of this model and that of
    the last experience, for exit k the mean over the maps up to it, and ``flat (1 - cos(f, f_old))`` on its embedded
    tap. Classes are predicted by the local similarity classifier, the cosines to several proxies of each class, trained
    by an NCA loss with a margin, which replaces the cross-entropy. Maps are used as the stages return them, after the
    last ReLU; new proxies are initialized at random, not imprinted; the authors' fine-tuning on balanced data is left
    out. Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning" (2020).

    Use it for many small experiences with a replay buffer: ``podnet + er``. Cost: a forward pass of the old model per
    step, a copy of it, and ``proxies`` rows per class. The gradient of the distances has the same norm however close
    the maps are: with a learning rate that stays large they oscillate, and a smaller ``spatial`` preserves them better.

    Args:
        spatial: Weight of the maps; the authors' options give 3 for CIFAR-100, 8 for ImageNet. In runs of a few epochs
            on digits and MNIST 1 was 2.3 points better than 3 on held-out data.
        flat: Weight of the features; 1 for CIFAR-100, 10 for ImageNet.
        pooling: Dimension over which maps are summed: ``spatial`` (rows, and columns), ``width``, ``height``, ``gap``
            (both), ``channels``, ``pixels`` (no sum). For tokens, all but the last two sum over the tokens.
        at: Maps or tokens to distill, by the names of their taps; ``auto``: those of the exits, and the last of every
            resolution.
        classifier: ``lsc``: local similarity, NCA loss; ``linear``: the exits' own classifiers, cross-entropy.
        proxies: Per class, in ``lsc``.
        margin: Of the NCA loss, in similarities.
        eta: Initial scale of the similarities; it is learned, one per exit. The authors' code starts at 1, from where
            160 epochs of SGD reach useful values and short runs do not: there 30 was 1.1 points better than 10 on
            held-out data, and with 1 and 3 MNIST was hardly learned.
        old: Whether proxies of old classes are ``fixed``, as published, or ``learn``. (Coupled weight decay with Adam
            may rotate a fixed one; SGD and AdamW only shorten it, which changes nothing.)
    """

    name: ClassVar[str] = "podnet"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"classifier", "task_loss"})
    terms: ClassVar[tuple[str, ...]] = ("spatial", "flat")

    spatial: float = 1.0
    flat: float = 1.0
    pooling: Pooling = "spatial"
    at: Literal["auto"] | tuple[str, ...] = "auto"
    classifier: Literal["lsc", "linear"] = "lsc"
    proxies: int = 10
    margin: float = 0.6
    eta: float = 30.0
    old: Literal["fixed", "learn"] = "fixed"

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("spatial", self.spatial >= 0, "give a number of at least 0"),
            ("flat", self.flat >= 0, "give a number of at least 0"),
            ("proxies", self.proxies >= 1, "give at least 1"),
            ("margin", self.margin >= 0, "give a number of at least 0"),
            ("eta", self.eta > 0, "give a number above 0"),
        ):
            if not ok:
                raise ConfigError(f"components.podnet.{key}: found {getattr(self, key)}; {advice}")

    def acts_at(self) -> tuple[str, ...]:
        """Return the hooks; with linear classifiers, without those of classifiers and task loss."""
        unused = {"setup_network", "task_loss", "before_experience"} if self.classifier == "linear" else set[str]()
        return tuple(hook for hook in super().acts_at() if hook not in unused)

    @property
    def named_taps(self) -> Mapping[str, Sequence[str]]:
        """Those of ``at``."""
        return {} if self.at == "auto" else {"at": self.at}

    def taps(self, network: Network) -> Sequence[str]:
        """Return the taps of all exits and of the maps to distill."""
        return tuple(dict.fromkeys((*network.exit_taps, *self._distilled_maps(network))))

    def setup_network(self, network: Network) -> None:
        """Install classifiers with proxies at every exit."""
        network.classify_with(partial(CosineLinear, proxies=self.proxies, scale=self.eta))

    def init_state(self, network: Network) -> State:
        """Return the maps up to each exit, and no teacher."""
        place = network.backbone.tap
        maps = self._distilled_maps(network)
        up_to = tuple(tuple(tap for tap in maps if place(tap) <= place(end)) for end in network.exit_taps)
        return {"teacher": None, "maps": up_to}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fix the proxies of old classes."""
        if self.old == "fixed":
            for head in network.heads:
                head.fix(set(context.experience.past) - set(context.experience.classes))  # type: ignore[operator]
        return state

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the NCA loss of every exit."""
        scales = [head.scale for head in step.network.heads]
        batch = step.batch
        return nca(step.output.logits, batch.y, margin=self.margin, scales=scales, weight_B=batch.weight_B)  # type: ignore[arg-type]

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the distillation of maps and features, from the second experience on."""
        if state["teacher"] is None:
            return {}
        experience, network = step.context.experience, step.network
        factor = sqrt(len(experience.classes_so_far) / len(experience.classes))
        maps = tuple(dict.fromkeys(tap for taps in state["maps"] for tap in taps))
        teacher = step.run(state["teacher"], taps=(*network.exit_taps, *maps))
        flat_K = cosine_distance(exit_embeddings(network, step.output), exit_embeddings(network, teacher))
        terms = {"flat": self.flat * factor * flat_K}
        if maps:
            found = {tap: pod(step.output.taps[tap], teacher.taps[tap], pooling=self.pooling) for tap in maps}
            none = flat_K.new_zeros(())
            means = [torch.stack([found[tap] for tap in taps]).mean() if taps else none for taps in state["maps"]]
            terms["spatial"] = self.spatial * factor * torch.stack(means)
        return terms

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher."""
        return {**state, "teacher": freeze(network)}

    def _distilled_maps(self, network: Network) -> tuple[str, ...]:
        """Return the maps to distill in order of depth."""
        backbone = network.backbone
        if self.at == "auto":
            return _select_maps(backbone, network.exit_taps)
        for tap in self.at:
            backbone.tap(tap, where="components.podnet.at")
            if len(backbone.tap_shapes[tap]) < 2:
                raise ConfigError(
                    f"components.podnet.at: found '{tap}' of shape {backbone.tap_shapes[tap]}, with nothing to pool; "
                    f"give maps or tokens"
                )
        return tuple(sorted(self.at, key=backbone.tap))


def _select_maps(backbone: Backbone, exits: Sequence[str]) -> tuple[str, ...]:
    """Select taps that can be pooled. The resolution of tokens is their number."""
    shapes = backbone.tap_shapes
    spatial = [name for name in backbone.names if len(shapes[name]) > 1]
    last = {shapes[name][1:] if len(shapes[name]) == 3 else shapes[name][:1]: name for name in spatial}
    return tuple(name for name in spatial if name in exits or name in last.values())
