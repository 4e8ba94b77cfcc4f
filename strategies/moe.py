"""Mixture of experts: each token runs only the experts of a feed-forward network that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, nn

from clframe.core.component import Component
from clframe.core.declarations import options_without_effect
from clframe.core.types import Experience, State, StepContext
from clframe.errors import ClframeError, ConfigError, reword
from clframe.moe import count_usage, routed_layers, set_gate
from clframe.moe.convert import Split
from clframe.moe.pipeline import GateKind, Recipe, default_most, fit_experts, make_gate
from clframe.moe.router import RouterKind
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.replay.buffers import BufferSamples


@dataclass(frozen=True, kw_only=True)
class MoE(Component):
    """Mixture of experts (D2DMoE): dense training, then experts of which each token runs as many as it needs.

    The neurons of every feed-forward network are divided into experts of equal size. A small router predicts the norm
    of each expert's output, ``|V relu(U x)|_e`` for ``||E_e(x)||``, and expert e runs if its score is at least
    ``(1 - tau)`` of the token's highest score. All experts together equal the dense network, and training is the same
    as without this component. At the end of the first experience neurons with similar input weights are grouped into
    experts (balanced k-means), and routers are trained on the inputs of their layers, with all else frozen. From then
    on the gate applies in evaluation mode, including teachers and features that other components store. tau can be
    changed on a trained model (``clframe.moe.set_tau``): one run gives the whole curve of accuracy against cost.
    Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024);
    with ``router=activation gate=top_k``: Zhang et al., "MoEfication" (2022).

    Use it to reduce the inference cost of a transformer or an ``mlp``; combine it with ``sparsity``, which leaves fewer
    active experts, and with ``exits`` for early exits. Costs the routers, a few percent of the networks' MACs, and
    after an experience with router training ``epochs`` passes over ``samples`` of its data. In the backbone ``mlp``
    two neighboring layers form one network, so that no exit can be attached between them.

    Args:
        experts: Experts of each feed-forward network; with neither this nor ``expert_size``, the largest number up to
            24 that divides its neurons.
        expert_size: Neurons of an expert, instead of ``experts``.
        split: Grouping of neurons, once, after the first experience: ``kmeans`` by similar input weights (those of the
            gate in gated networks); ``coactivation`` by activity on the same tokens; ``random``.
        router: Quantity that routers predict: ``norm``, the norm of an expert's output; ``activation``, the sum of its
            activations. ``analytical`` computes one representative neuron of each expert and is not trained (Pei et
            al., "CMoE", 2025).
        router_width: Width of a router's hidden layer; none takes a twenty-fourth of the network's, at least 16.
        shared: Number of experts that always run, made of the neurons that are active in most tokens; the gate chooses
            among the others, ``k`` in addition.
        gate: Selection of experts: ``dynamic_k``; ``cumulative``, the best experts until their fraction of the total
            score reaches tau; ``top_k``.
        tau: Setting of the first two gates: 1 runs all experts, 0 only the best one.
        k: Setting of ``top_k``.
        fit: Whether routers are trained once, after the ``first`` experience, or after ``each``.
        epochs: Epochs of router training; none: 7.
        lr: Initial learning rate of its Adam, with cosine decay to a thousandth; none: 1e-3.
        samples: Samples for router training, drawn at random from the experience's training data and the replay
            buffer, if there is one; 0 takes all.
        batch_size: Batch size of router training.
        training: Whether all experts run in training (``dense``), or the gate applies there too (``gated``) once
            routers are trained: cheaper, but only active experts learn.
    """

    name: ClassVar[str] = "moe"
    changes_activity: ClassVar[bool] = True
    compilable: ClassVar[bool] = False
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    changes_network: ClassVar[bool] = True
    phase: ClassVar[str] = "router"

    experts: int | None = None
    expert_size: int | None = None
    split: Split = "kmeans"
    router: RouterKind = "norm"
    router_width: int | None = None
    shared: int = 0
    gate: GateKind = "dynamic_k"
    tau: float = 0.8
    k: int = 8
    fit: Literal["first", "each"] = "first"
    epochs: int | None = None
    lr: float | None = None
    samples: int = 2000
    batch_size: int = 64
    training: Literal["dense", "gated"] = "dense"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.experts is not None and self.expert_size is not None:
            raise ConfigError("components.moe.experts: found together with expert_size; give one of them")
        for key, ok, advice in (
            ("experts", self.experts is None or self.experts >= 1, "give at least 1"),
            ("expert_size", self.expert_size is None or self.expert_size >= 1, "give at least 1"),
            ("router_width", self.router_width is None or self.router_width >= 1, "give at least 1"),
            ("tau", 0 <= self.tau <= 1, "give a number from 0 (one expert a token) to 1 (all of them)"),
            ("k", self.k >= 1, "give at least 1"),
            ("shared", self.shared >= 0, "give 0 or more"),
            ("epochs", self.epochs is None or self.epochs >= 1, "give at least 1"),
            ("lr", self.lr is None or self.lr > 0, "give a number above 0"),
            ("samples", self.samples >= 0, "give a number of samples, or 0 for all"),
            ("batch_size", self.batch_size >= 1, "give at least 1"),
        ):
            if not ok:
                raise ConfigError(f"components.moe.{key}: found {getattr(self, key)}; {advice}")
        for key in ("epochs", "lr", "router_width"):
            if self.router == "analytical" and getattr(self, key) is not None:
                raise ConfigError(
                    f"components.moe.{key}: found {getattr(self, key)} for analytical routers, which are not trained "
                    f"and have no hidden layer; leave it out"
                )

    @property
    def unused_options(self) -> Mapping[str, str]:
        """Settings of other gates."""
        reason = f"the gate is {self.gate}"
        return options_without_effect(
            self, (self.gate != "top_k", ["tau"], reason), (self.gate == "top_k", ["k"], reason)
        )

    def setup_network(self, network: Network) -> None:
        """Replace every feed-forward network by experts, with neurons in their present order and all experts active."""
        recipe = Recipe(
            experts=self.experts, expert_size=self.expert_size, most=default_most(self.experts, self.expert_size),
            router=self.router, router_width=self.router_width, shared=self.shared,
        )  # fmt: skip
        try:
            layers = recipe.make_experts(network)
        except ClframeError as error:
            raise reword(error, lambda message: f"components.{message}") from None
        set_gate(network, make_gate(self.gate, tau=self.tau, k=self.k))
        for layer in layers.values():
            layer.ready = False
            layer.when = "always" if self.training == "gated" else "evaluation"
        _freeze_routers(network)

    def init_state(self, network: Network) -> State:
        """State before any router training."""
        return {"fitted": 0, "loss": None, "experts_per_token": ()}

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Freeze the routers before other components collect the trainable parameters."""
        _freeze_routers(network)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze the routers again: other components may have unfrozen the whole backbone."""
        _freeze_routers(network)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Group neurons into experts after the first experience, and train the routers if due."""
        _freeze_routers(network)
        samples, first = context.experience.samples, not state["fitted"]
        sources: tuple[Samples, ...] = (samples,)
        if context.memory is not None:
            sources = (samples, BufferSamples(context.memory, samples))
        batches = self._draw_batches(sources, context.generator)
        if not batches or not (first or self.fit == "each"):
            return state
        losses = fit_experts(
            network, batches, split=self.split if first else None, generator=context.generator,
            epochs=self.epochs or 7, learning_rate=self.lr or 1e-3, call=_run,
        )  # fmt: skip
        with preserving_state([network]), count_usage(network) as usage:
            for batch in batches:
                _run(network, batch)
            used = usage()
        return {
            "fitted": state["fitted"] + 1,
            "loss": losses[-1] if losses else None,
            "experts_per_token": tuple(used[name].experts_per_token for name in routed_layers(network)),
        }

    def extra_cost(self, network: Network, state: State) -> Mapping[str, int]:
        """MACs per token of all feed-forward networks: dense, of routers, and routed, at the last router training."""
        macs = [layer.macs() for layer in routed_layers(network).values()]
        found = {"dense_macs_per_token": sum(m.dense for m in macs)}
        found["router_macs_per_token"] = sum(m.router for m in macs)
        if state["fitted"]:
            pairs = zip(macs, state["experts_per_token"], strict=True)
            found["routed_macs_per_token"] = round(sum(m.router + ran * m.expert for m, ran in pairs))
        return found

    def _draw_batches(
        self, sources: tuple[Samples, ...], generator: Generator
    ) -> list[tuple[Samples, torch.Tensor]]:
        """Draw batches in random order over all sources; each batch comes from one of them."""
        drawn_N = torch.randperm(sum(map(len, sources)), generator=generator)
        drawn_N = drawn_N[: self.samples] if self.samples else drawn_N
        batches, before = [], 0
        for source in sources:
            index_N = drawn_N[(drawn_N >= before) & (drawn_N < before + len(source))] - before
            batches += [(source, index_B) for index_B in index_N.split(self.batch_size) if len(index_B)]
            before += len(source)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[at] for at in order]


def _run(network: nn.Module, batch: tuple[Samples, torch.Tensor]) -> Any:
    samples, index = batch
    assert isinstance(network, Network)
    return network(network.to_device(samples.prepare(samples.raw(index))))


def _freeze_routers(network: Network) -> None:
    """Exclude routers from the strategy's losses: they are trained on their own targets only."""
    for layer in routed_layers(network).values():
        layer.router.requires_grad_(False)
