"""Learning to Prompt: select prompts from a pool for a frozen vision transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import cross_entropy
from clframe.nn.network import Network
from clframe.nn.prompts import QUERY, Frozen, PromptPool, Read, add_prompts, key_loss, mask_outside, prompt_pool


@dataclass(frozen=True, kw_only=True)
class L2P(Component):
    """Learning to Prompt (L2P): learn tokens, selected for each image from a pool, for a frozen vision transformer.

    The query q is the feature of the unprompted backbone; the ``top`` prompts with the nearest keys are inserted after
    the class token, and only prompts, keys and classifiers learn, by the cross-entropy over the experience's own
    classes and ``pull * sum_n (1 - cos(q, key_n))``. Taps grow by these tokens, from the new stage ``prompt`` on; the
    new stage ``query`` has the query as its tap. Dropout of the backbone is off. Prompts are selected per image, not
    for a whole batch as in the authors' code, where predictions depend on the other images. Wang et al., "Learning to
    Prompt for Continual Learning" (2022).

    Use it with pre-trained vision transformers (``vit_b_16``, ``timm``): its accuracy rests on the backbone's features,
    and no sample is stored. Cost: a second forward pass, in training and inference, and ``top * length`` more tokens.

    Args:
        prompts: Size of the pool. 10 as published for CIFAR-100.
        length: Tokens of a prompt. 5 as published.
        top: Prompts inserted per image. 5 as published.
        pull: Weight of the term that moves keys towards the queries that select them. 0.5 as published.
        read: Input of the classifier: the mean of the ``prompts``' outputs, as published, or the ``first`` token, the
            class token. Exits before the last always use the first.
        classes: Classes in a new sample's cross-entropy: those of its ``experience``, as published, or ``all`` so far.
            Replayed samples compete with all.
    """

    name: ClassVar[str] = "l2p"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    terms: ClassVar[tuple[str, ...]] = ("pull",)

    prompts: int = 10
    length: int = 5
    top: int = 5
    pull: float = 0.5
    read: Read = "prompts"
    classes: Literal["experience", "all"] = "experience"

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("prompts", self.prompts >= 1, "give at least 1 prompt"),
            ("length", self.length >= 1, "give at least 1 token"),
            ("top", 1 <= self.top <= self.prompts, f"give a number from 1 to prompts, which is {self.prompts}"),
            ("pull", self.pull >= 0, "give a number of at least 0"),
        ):
            if not ok:
                raise ConfigError(f"components.l2p.{key}: found {getattr(self, key)}; {advice}")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the tap of the query."""
        return (QUERY,)

    def setup_network(self, network: Network) -> None:
        """Freeze the backbone and add the prompts; exits keep their taps."""
        width = network.backbone.features
        pool = PromptPool(width, pool=self.prompts, length=self.length, top=self.top)
        add_prompts(network, pool, read=self.read, where="components.l2p")

    def init_state(self, network: Network) -> State:
        """Return a state in which all classes compete."""
        return {"outside": None}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Mark the outputs outside the experience's classes."""
        outside_C = torch.ones(network.classes, dtype=torch.bool)
        outside_C[list(context.experience.classes)] = False
        return {"outside": outside_C.to(network.final.weight.device) if self.classes == "experience" else None}

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze the backbone again, in case exits trained separately have unfrozen it."""
        for part in network.backbone.modules():
            if isinstance(part, Frozen):
                part.freeze()

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return loss_K over the classes that each sample competes with."""
        logits, y_B = step.output.logits, step.batch.y
        if state["outside"] is not None:
            logits = tuple(mask_outside(logits_BC, y_B, outside_C=state["outside"]) for logits_BC in logits)
        return cross_entropy(logits, y_B, weight_B=step.batch.weight_B)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the term on the keys, one value for all exits."""
        if self.pull == 0:
            return {}
        similarity_BN, _ = prompt_pool(step.network).select(step.output.taps[QUERY])
        return {"pull": self.pull * key_loss(similarity_BN)}
