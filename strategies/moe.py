"""Mixture of experts: at inference, each token runs only those parts of a feed-forward network that matter to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, nn

from clframe.core.component import Component
from clframe.core.types import Experience, State, StepContext
from clframe.errors import ClframeError, ConfigError
from clframe.moe import CumulativeShare, DynamicK, TopK, counting, fit_routers, regroup, routed_layers, to_experts
from clframe.moe.convert import Split
from clframe.moe.router import Gate, RouterKind
from clframe.nn.backbones.base import untouched
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.replay.buffers import Kept

MOST = 24
"""Experts of a network at most, where nothing else is asked for: ViT-B's 3072 neurons make the published 24 x 128."""


@dataclass(frozen=True, kw_only=True)
class MoE(Component):
    """Mixture of experts (D2DMoE): dense training, then experts of which each token runs as many as it needs.

    Every feed-forward network's neurons are divided into experts of equal size; a small router foresees how much each
    would contribute, ``|V relu(U x)|_e`` for ``||E_e(x)||``, and expert e runs where its score is at least
    ``(1 - tau)`` of the token's highest one. All experts together are the dense network, and training is what it would
    be without. At the end of the first experience neurons with similar input weights become one expert (balanced
    k-means), routers are trained on the inputs of their layers, all else frozen, and from then on the gate acts in
    evaluation mode: in answers, in features that others keep, in teachers. tau may be changed on a trained model
    (``clframe.moe.set_tau``): one run gives the whole curve of accuracy against cost. Szatkowski et al.,
    "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024); with
    ``router=activation gate=top_k``: Zhang et al., "MoEfication" (2022).

    Use it where predictions of a transformer or an ``mlp`` should cost less; ``sparsity`` beside it leaves less to run,
    and ``exits`` stop early on top of it. Costs the routers, some percent of the networks' MACs, and after an
    experience that trains them ``epochs`` passes over ``samples`` of its data. On our ``mlp`` two neighboring
    layers are one network, so no exit can lie between them.

    Args:
        experts: Experts of each feed-forward network; neither this nor ``expert_size`` takes as many as divide its
            neurons evenly, 24 at most.
        expert_size: Instead, neurons of an expert.
        split: How neurons are grouped, once, after the first experience: ``kmeans`` by similar input weights, those of
            the gate in gated networks; ``coactivation`` by firing for the same tokens; ``random``.
        router: What routers foresee: ``norm``, the length of an expert's output; ``activation``, the sum of its
            activations.
        router_width: Units of a router's hidden layer; none takes a twenty-fourth of the network's, at least 16.
        gate: Who runs: ``dynamic_k``; ``cumulative``, the best whose shares of the total score reach tau; ``top_k``.
        tau: Of the first two gates: 1 runs all experts, 0 the best one only.
        k: Of ``top_k``.
        fit: Whether routers are trained after the ``first`` experience and frozen, or go on after ``each``.
        epochs: Of router training.
        lr: Of its Adam at the start; it falls to a thousandth along a cosine.
        samples: Samples routers are trained on, drawn at random from the experience's training data and the memory, if
            one is kept; 0 takes all.
        batch_size: Of router training.
        training: Whether all experts run in training (``dense``), or the gate acts there too (``gated``), as soon as
            routers are trained: cheaper, and only experts that run learn.
    """

    name: ClassVar[str] = "moe"
    remakes: ClassVar[bool] = True
    phase: ClassVar[str] = "router"

    experts: int | None = None
    expert_size: int | None = None
    split: Split = "kmeans"
    router: RouterKind = "norm"
    router_width: int | None = None
    gate: Literal["dynamic_k", "cumulative", "top_k"] = "dynamic_k"
    tau: float = 0.8
    k: int = 8
    fit: Literal["first", "each"] = "first"
    epochs: int = 7
    lr: float = 1e-3
    samples: int = 2000
    batch_size: int = 64
    training: Literal["dense", "gated"] = "dense"

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.experts is not None and self.expert_size is not None:
            raise ConfigError("components.moe.experts: found beside expert_size; give one of them")
        for key, ok, advice in (
            ("experts", self.experts is None or self.experts >= 1, "give at least 1"),
            ("expert_size", self.expert_size is None or self.expert_size >= 1, "give at least 1"),
            ("router_width", self.router_width is None or self.router_width >= 1, "give at least 1"),
            ("tau", 0 <= self.tau <= 1, "give a number from 0 (one expert a token) to 1 (all of them)"),
            ("k", self.k >= 1, "give at least 1"),
            ("epochs", self.epochs >= 1, "give at least 1"),
            ("lr", self.lr > 0, "give a number above 0"),
            ("samples", self.samples >= 0, "give a number of samples, or 0 for all"),
            ("batch_size", self.batch_size >= 1, "give at least 1"),
        ):
            if not ok:
                raise ConfigError(f"components.moe.{key}: found {getattr(self, key)}; {advice}")

    def setup_network(self, network: Network) -> None:
        """Put experts in place of every feed-forward network; their neurons lie as they did, and all run."""
        sized = self.experts is not None or self.expert_size is not None
        try:
            layers = to_experts(
                network,
                experts=self.experts,
                expert_size=self.expert_size,
                most=None if sized else MOST,
                split=None,
                router=self.router,
                router_width=self.router_width,
            )
        except ClframeError as error:
            raise type(error)(f"components.{error}") from None
        for layer in layers.values():
            layer.gate = self._gate()
            layer.ready = False
            layer.when = "always" if self.training == "gated" else "evaluation"
        _hold_routers(network)

    def init_state(self, network: Network) -> State:
        """No router has been trained."""
        return {"fitted": 0, "loss": None, "experts_per_token": ()}

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Hold the routers still before other components look at what learns."""
        _hold_routers(network)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Done anew in every epoch, since others may have set the whole backbone free."""
        _hold_routers(network)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """After the first experience make the experts; train the routers if it is their turn."""
        _hold_routers(network)
        samples, first = context.experience.samples, not state["fitted"]
        parts: tuple[Samples, ...] = (samples,)
        if context.memory is not None:
            parts = (samples, Kept(context.memory, samples))
        batches = self._drawn(parts, context.generator)
        if not batches or not (first or self.fit == "each"):
            return state
        layers = routed_layers(network)
        if first:
            regroup(network, split=self.split, generator=context.generator, batches=batches, call=_run)
            for layer in layers.values():
                layer.router.draw(context.generator)
                layer.ready = True
        losses = fit_routers(network, batches, epochs=self.epochs, learning_rate=self.lr, call=_run)
        with untouched([network]), counting(network) as usage:
            for batch in batches:
                _run(network, batch)
            used = usage()
        return {
            "fitted": state["fitted"] + 1,
            "loss": losses[-1],
            "experts_per_token": tuple(used[name].experts_per_token for name in layers),
        }

    def extra_cost(self, network: Network, state: State) -> Mapping[str, int]:
        """MACs of a token in all feed-forward networks: dense, of the routers, and as routed when these were fitted."""
        macs = [layer.macs() for layer in routed_layers(network).values()]
        found = {"dense_macs_per_token": sum(m.dense for m in macs)}
        found["router_macs_per_token"] = sum(m.router for m in macs)
        if state["fitted"]:
            pairs = zip(macs, state["experts_per_token"], strict=True)
            found["routed_macs_per_token"] = round(sum(m.router + ran * m.expert for m, ran in pairs))
        return found

    def _gate(self) -> Gate:
        if self.gate == "top_k":
            return TopK(k=self.k)
        return DynamicK(tau=self.tau) if self.gate == "dynamic_k" else CumulativeShare(tau=self.tau)

    def _drawn(self, parts: tuple[Samples, ...], generator: Generator) -> list[tuple[Samples, torch.Tensor]]:
        """Batches of samples, in random order, from all parts; each from one of them."""
        drawn = torch.randperm(sum(map(len, parts)), generator=generator)
        drawn = drawn[: self.samples] if self.samples else drawn
        batches, before = [], 0
        for part in parts:
            own = drawn[(drawn >= before) & (drawn < before + len(part))] - before
            batches += [(part, index) for index in own.split(self.batch_size) if len(index)]
            before += len(part)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[place] for place in order]


def _run(network: nn.Module, batch: tuple[Samples, torch.Tensor]) -> Any:
    samples, index = batch
    assert isinstance(network, Network)
    return network(network.place(samples.prepare(samples.raw(index))))


def _hold_routers(network: Network) -> None:
    """Routers learn from what they foresee, never from the strategy's losses."""
    for layer in routed_layers(network).values():
        layer.router.requires_grad_(False)
