"""Experts with a router and a gate, as a replacement of a feed-forward network, and their cost in MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.accounting.macs import ConditionalModule
from clframe.moe.dispatch import Name
from clframe.moe.experts import ExpertLayer
from clframe.moe.router import ALL, CumulativeShare, DynamicK, Gate, NormRouter, Router, TopK
from clframe.moe.routing import expert_macs
from clframe.moe.triton_router import can_route, route_tokens, routes_agree

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Macs:
    """MACs per token.

    Attributes:
        expert: Of one expert.
        experts: Number of experts.
        router: Of the router.
    """

    expert: int
    experts: int
    router: int

    @property
    def dense(self) -> int:
        """All experts without the router, which equals the dense network."""
        return self.expert * self.experts

    @property
    def router_share(self) -> float:
        """Router MACs as a fraction of the dense network's."""
        return self.router / self.dense


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Usage of one layer while it was counted.

    Attributes:
        tokens: Number of tokens.
        ran_E: Number of tokens for which the gate chose each expert.
        macs: Cost per token.
        routed: Number of tokens for which the router was evaluated.
        computed: Number of (token, expert) pairs computed, including pairs that the gate excluded but that were masked:
            all pairs in dense execution, and neighbors of active experts where small experts are executed in groups.
    """

    tokens: int
    ran_E: tuple[int, ...]
    macs: Macs
    routed: int
    computed: int

    @property
    def experts_per_token(self) -> float:
        """Mean number of active experts; NaN without tokens."""
        return sum(self.ran_E) / self.tokens if self.tokens else float("nan")

    @property
    def router_macs(self) -> int:
        """MACs of the router."""
        return self.routed * self.macs.router

    @property
    def total_macs(self) -> int:
        """MACs of all (token, expert) pairs chosen by the gate, and of the router."""
        return sum(self.ran_E) * self.macs.expert + self.router_macs

    @property
    def executed_macs(self) -> int:
        """MACs of all computed pairs and of the router."""
        return self.computed * self.macs.expert + self.router_macs

    @property
    def dense_macs(self) -> int:
        """MACs of the dense network for the same tokens."""
        return self.tokens * self.macs.dense

    @property
    def share(self) -> float:
        """``total_macs`` as a fraction of ``dense_macs``; NaN without tokens."""
        return self.total_macs / self.dense_macs if self.tokens else float("nan")


class Measured(NamedTuple):
    """The fastest executor for a gate and a number of tokens.

    Attributes:
        gate: The gate that was measured.
        tokens: Number of tokens.
        executor: Its name; ``all`` runs all experts without the router, ``plan`` is the choice of the cost model.
        threads: Number of threads on a CPU, 0 on CUDA; the measurement applies to these only.
    """

    gate: Gate
    tokens: int
    executor: str
    threads: int


When = Literal["always", "evaluation"]
"""When the gate is applied: always, or in evaluation mode only, with all experts active in training."""


class RoutedExperts(ConditionalModule):
    """Experts of which each token runs those that the gate selects by the router's scores.

    The output is the unweighted sum of the active experts. A gate that keeps all experts does not evaluate the router.

    Args:
        experts: Neurons of the network.
        router: Predicts the contribution of each expert that is not shared.
        gate: Selects the active experts among these; may be changed at any time.
        dropout: Dropout probability of the outputs in training.
        shared: Number of experts, the first ones, that always run.

    Attributes:
        when: When the gate is applied.
        ready: Whether the router has been trained; all experts run until then. Part of the state dict, so that a loaded
            model routes like the saved one.
        observer: Called with each x_ND before routing, if set.
        ran: Usage counters, if usage is counted: tokens by expert, then the number of tokens, of tokens for which the
            router was evaluated, and of computed pairs.
        chosen: Called with the number of active experts of each token, in the shape of the tokens, if set.
        measured: Executors to use instead of the plan's choice, see :func:`~clframe.moe.tuning.tune`.
        counted: Share of (token, expert) pairs that each gate kept when its usage was counted last. The choice of an
            executor on CUDA expects it again.
    """

    def __init__(
        self, experts: ExpertLayer, router: Router, *, gate: Gate, dropout: float = 0.0, shared: int = 0
    ) -> None:
        super().__init__()
        self.shared = shared
        self.experts = experts
        self.router = router
        self.gate = gate
        self.dropout = dropout
        self.when: When = "always"
        self.ready = True
        self.observer: Callable[[Tensor], None] | None = None
        self.ran: Tensor | None = None
        self.chosen: Callable[[Tensor], None] | None = None
        self.measured: tuple[Measured, ...] = ()
        self.counted: dict[Gate, float] = {}

    @property
    def routes(self) -> bool:
        """Whether the gate is applied in the current mode."""
        return self.ready and not self.gate.keeps_all and (self.when == "always" or not self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Route the tokens independently; any number of leading dimensions."""
        x_ND = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if self.observer is not None:
            self.observer(x_ND)
        watched = self.ran is not None or self.chosen is not None
        fastest = self._fastest(x_ND) if self.measured else None
        routes = self.routes and fastest != "all"
        # For a single token the overhead of small operators dominates; this path has the fewest.
        if routes and not fastest and not watched and x_ND.shape[0] == 1 and self.experts.can_run_one(x_ND):
            chosen = self.gate.select(self.router(x_ND)[0])
            if self.shared:
                chosen = [*range(self.shared), *(expert + self.shared for expert in chosen)]
            y_1O = self.experts.run_one(x_ND, chosen)
            return y_1O if x.dim() == 2 else y_1O.reshape(*x.shape[:-1], -1)
        keep_NE = self.keep(x_ND) if routes else None
        executor = cast("Name | None", fastest) if routes else None
        share = self._expected_share()
        if watched:
            self._count(x_ND, keep_NE, x.shape[:-1], executor=executor, share=share)
        y_NO: Tensor = self.experts(x_ND, keep_NE, executor=executor, share=share)
        if self.dropout:
            y_NO = nn.functional.dropout(y_NO, self.dropout, self.training)
        return y_NO if x.dim() == 2 else y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    @contextmanager
    def compute_all(self) -> Iterator[None]:
        """Context in which all experts run and the router does not."""
        with override({"": self}, "gate", lambda _: ALL):
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.measured = ()  # of another device or dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> Tensor:
        """:attr:`ready`, for the state dict."""
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :attr:`ready`."""
        self.ready = bool(state)

    def keep(self, x_ND: Tensor) -> Tensor:
        """Mask keep_NE of the experts chosen by the gate."""
        if torch.is_grad_enabled():  # entering no_grad takes microseconds, which matter for one token
            with torch.no_grad():
                return self.keep(x_ND)
        router, gate = self.router, self.gate
        if (
            isinstance(router, NormRouter)
            and not isinstance(gate, CumulativeShare)
            and can_route(router, gate, x_ND)
            and routes_agree(router, gate, x_ND)
        ):
            keep_NE = route_tokens(router, gate, x_ND)
        else:
            keep_NE = self.gate(self.router(x_ND))
        return F.pad(keep_NE, (self.shared, 0), value=True) if self.shared else keep_NE

    def macs(self) -> Macs:
        """MACs per token, by formula."""
        e = self.experts
        return Macs(
            expert=expert_macs(
                inputs=e.inputs, outputs=e.outputs, neurons=e.expert_size, gated=e.gate is not None
            ),
            experts=e.experts,
            router=self.router.macs,
        )

    def _expected_share(self) -> float | None:
        """Share of (token, expert) pairs that the gate keeps, None if it was not counted."""
        if isinstance(self.gate, TopK):
            return (self.gate.k + self.shared) / self.experts.experts
        if torch.are_deterministic_algorithms_enabled():
            return None  # checkpoints have no counts: a resumed run must choose as one that was not interrupted
        return self.counted.get(self.gate)

    def _fastest(self, x_ND: Tensor) -> str | None:
        """The executor measured for this gate, device and about as many tokens, the last measurement first.

        None without a measurement, and where the plan's choice was the fastest.
        """
        tokens, threads = len(x_ND), threads_of(x_ND)
        known = (one for one in reversed(self.measured) if one.gate == self.gate and one.threads == threads)
        near = (one.executor for one in known if one.tokens <= 2 * tokens and tokens <= 2 * one.tokens)
        found = next(near, "plan")
        return None if found == "plan" else found

    def _count(
        self,
        x_ND: Tensor,
        keep_NE: Tensor | None,
        shape: Sequence[int],
        *,
        executor: Name | None,
        share: float | None,
    ) -> None:
        if self.chosen is not None:
            all_N = torch.full((len(x_ND),), self.experts.experts, device=x_ND.device)
            self.chosen((all_N if keep_NE is None else keep_NE.sum(1)).view(shape))
        if self.ran is not None:
            tokens = len(x_ND)
            self.ran[:-3] += tokens if keep_NE is None else keep_NE.sum(0)
            self.ran[-3] += tokens
            self.ran[-2] += 0 if keep_NE is None else tokens
            self.ran[-1] += self.experts.computed(x_ND, keep_NE, executor=executor, share=share)


def threads_of(x_ND: Tensor) -> int:
    """Number of threads that operations on a tensor use; 0 on an accelerator."""
    return torch.get_num_threads() if x_ND.is_cpu else 0


def routed_layers(model: nn.Module) -> dict[str, RoutedExperts]:
    """All converted networks of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, RoutedExperts)}


@contextmanager
def override(layers: Mapping[str, RoutedExperts], attribute: str, value: Callable[[str], Any]) -> Iterator[None]:
    """Context in which an attribute of each layer is ``value(name)``; restores the previous values on exit."""
    before = {name: getattr(layer, attribute) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            setattr(layer, attribute, value(name))
        yield
    finally:
        for name, layer in layers.items():
            setattr(layer, attribute, before[name])


def set_gate(model: nn.Module, gate: Gate) -> None:
    """Set the gate of all layers."""
    for layer in routed_layers(model).values():
        layer.gate = gate


def set_tau(model: nn.Module, tau: float) -> None:
    """Set dynamic-k gates with this tau for all layers.

    Raises:
        ConfigError: tau outside [0, 1].
    """
    set_gate(model, DynamicK(tau=tau))
