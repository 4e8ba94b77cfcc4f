"""A feed-forward network as experts that share its weights out among them.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, F = E * H.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clframe.moe.dispatch import Choice, Name, Plan, choose, computed_pairs, full_precision, run
from clframe.moe.executors import Activation, Weights, cut, dense, hidden_of, inputs_of, token_by_token

if TYPE_CHECKING:
    from typing_extensions import Self


Linear = tuple[Tensor, "Tensor | None"]
"""Weight, outputs first, and bias."""


class ExpertLayer(nn.Module):
    """The neurons of ``down(act(up(x)))`` or of ``down(up(x) * act(gate(x)))``, expert by expert.

    The sum of all experts and of the output's bias is the dense network, to rounding.

    Args:
        up: Input layer, weight_FD and bias_F.
        down: Output layer, weight_OF and bias_O.
        activation: Between them, or on the gate.
        experts: How many; a divisor of F.
        gate: Gate layer, in a gated network.
        order_F: The dense network's neurons, expert by expert; as they are where None.
        dropout: Of the hidden neurons, in training.

    Attributes:
        up: [E, H, D], ``gate`` likewise; ``up_bias`` and ``gate_bias`` are [E, H].
        down: [E, H, O], transposed, so that what an expert needs is contiguous. ``bias`` is [O].
        order_F: Of the dense network.
        plan: When to run experts in which way.
        executor: A way of your own; None leaves it to the plan.
    """

    up: nn.Parameter
    up_bias: nn.Parameter | None
    gate: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down: nn.Parameter
    bias: nn.Parameter | None
    order_F: Tensor

    def __init__(
        self,
        up: Linear,
        down: Linear,
        *,
        activation: Activation,
        experts: int,
        gate: Linear | None = None,
        order_F: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        neurons = len(up[0])
        if order_F is None:
            order_F = torch.arange(neurons)
        order_F = order_F.to(up[0].device)

        def share(value: Tensor | None) -> nn.Parameter | None:
            if value is None:
                return None
            shared = value.detach().index_select(0, order_F).unflatten(0, (experts, -1)).contiguous()
            return nn.Parameter(shared, requires_grad=value.requires_grad)

        gate_weight, gate_bias = (None, None) if gate is None else gate
        bias = None if down[1] is None else nn.Parameter(down[1].detach().clone(), down[1].requires_grad)
        self.register_parameter("up", share(up[0]))
        self.register_parameter("up_bias", share(up[1]))
        self.register_parameter("gate", share(gate_weight))
        self.register_parameter("gate_bias", share(gate_bias))
        self.register_parameter("down", share(down[0].t()))
        self.register_parameter("bias", bias)
        self.activation = activation
        self.dropout = dropout
        self.plan = Plan()
        self.executor: Name | None = None
        self._ready: tuple[tuple[int, ...], Weights] | None = None
        self.register_buffer("order_F", order_F)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.up.shape[0]

    @property
    def expert_size(self) -> int:
        """Neurons of an expert."""
        return self.up.shape[1]

    @property
    def inputs(self) -> int:
        """Width of a token."""
        return self.up.shape[2]

    @property
    def outputs(self) -> int:
        """Width of an answer."""
        return self.down.shape[2]

    def weights(self) -> Weights:
        """All of them, not copied."""
        if torch.is_grad_enabled():
            return self._whole()
        # Attributes of modules are slow to read, and one token does not take long. Views see every change of the
        # weights unless these moved elsewhere.
        of = self._parameters
        hooks = len(getattr(self.activation, "_forward_hooks", ()))
        where = (*map(id, of.values()), of["up"].data_ptr(), of["down"].data_ptr(), id(self.activation), hooks)  # type: ignore[union-attr]
        if self._ready is None or self._ready[0] != where:
            whole = self._whole()
            unwatched = type(self.activation) is nn.ReLU and not self.activation._forward_hooks
            quick = torch.relu_ if unwatched else self.activation
            ready = cut(Weights(*map(_detached, whole)))
            self._ready = (where, whole._replace(cut=ready, activation=quick))
        return self._ready[1]

    def _whole(self) -> Weights:
        return Weights(
            self.up, self.down, self.activation, self.up_bias, self.gate, self.gate_bias, self.bias
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies cut their own weights."""
        return {**self.__dict__, "_ready": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._ready = None  # it would keep the old weights alive
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x_ND: Tensor, keep_NE: Tensor | None = None, weight_NE: Tensor | None = None) -> Tensor:
        """y_NO of the experts that run; without ``keep_NE``, of all.

        Where all run, autocast casts as it would in a dense network; otherwise it does not, because it would copy all
        weights for the few that are needed.
        """
        weights = self.weights()
        plain = keep_NE is None and torch.is_autocast_enabled(x_ND.device.type)
        with nullcontext() if plain else full_precision(x_ND.device.type):
            if not plain:
                x_ND = x_ND.to(weights.up_EHD.dtype)
            if self._computes_all():
                dropout = self.dropout if self.training else 0.0
                return dense(weights, x_ND, keep_NE, weight_NE, dropout=dropout)
            return run(weights, x_ND, keep_NE, weight_NE, plan=self.plan, executor=self.executor)

    def computed(self, x_ND: Tensor, keep_NE: Tensor | None) -> int | Tensor:
        """How many (token, expert) pairs :meth:`forward` computes for these; on CUDA a tensor, so that nobody waits."""
        if keep_NE is None or self._computes_all():
            return len(x_ND) * self.experts
        if self.executor is not None:
            return computed_pairs(Choice(self.executor), keep_NE)
        return computed_pairs(choose(self.weights(), x_ND.to(self.up.dtype), keep_NE, plan=self.plan), keep_NE)

    def _computes_all(self) -> bool:
        """Dropout acts on all hidden neurons; and whoever watches them while something learns wants to see all."""
        if self.training and self.dropout:
            return True
        watched = isinstance(self.activation, nn.Module) and bool(self.activation._forward_hooks)
        return watched and self.training and torch.is_grad_enabled()

    def takes_one(self, x_1D: Tensor) -> bool:
        """Whether :meth:`one` can run a token: on the CPU, in evaluation, as the plan will have it."""
        if torch.is_grad_enabled() or self.training or not x_1D.is_cpu or torch.is_autocast_enabled("cpu"):
            return False
        up = self._parameters["up"]
        assert up is not None
        return x_1D.dtype == up.dtype and self.executor is None and self.plan.few > 0

    def one(self, x_1D: Tensor, chosen: list[int]) -> Tensor:
        """y_1O of one token and the experts that it keeps: what ``forward`` does, by the shortest way."""
        weights = self.weights()
        experts, neurons, _ = weights.up_EHD.shape
        if 0 < len(chosen) <= self.plan.worth(neurons, threads=torch.get_num_threads()) * experts:
            return token_by_token(weights, x_1D, [chosen], None)
        if len(chosen) == experts:
            return dense(weights, x_1D, None)
        keep_E = torch.zeros(experts, dtype=torch.bool)
        return dense(weights, x_1D, keep_E.index_fill_(0, torch.tensor(chosen, dtype=torch.long), 1)[None])

    @torch.no_grad()
    def norms(self, x_ND: Tensor) -> Tensor:
        """norm_NE: the length of each expert's output, the output's bias left out."""
        return torch.stack(
            [
                torch.linalg.vector_norm(hidden_NH @ down_HO, dim=1)
                for hidden_NH, down_HO in zip(self.hidden(x_ND).unbind(1), self.down, strict=True)
            ],
            1,
        )

    @torch.no_grad()
    def hidden(self, x_ND: Tensor) -> Tensor:
        """hidden_NEH of all neurons."""
        w = self.weights()
        hidden_NF = hidden_of(w, x_ND, *(None if part is None else part.flatten(0, 1) for part in inputs_of(w)))
        return hidden_NF.view(-1, self.experts, self.expert_size)

    @torch.no_grad()
    def regroup(self, order_F: Tensor) -> None:
        """Other experts out of the same neurons; weights are written in place.

        Args:
            order_F: The neurons as they now lie, expert by expert.
        """
        order_F = order_F.to(self.order_F.device)
        for part in (self.up, self.up_bias, self.gate, self.gate_bias, self.down):
            if part is not None:
                part.copy_(part.flatten(0, 1)[order_F].view_as(part))
        self.order_F.copy_(self.order_F[order_F])

    @torch.no_grad()
    def to_dense(self) -> tuple[Linear, Linear | None, Linear]:
        """Copies of up, gate and down as the dense network had them."""
        back_F = self.order_F.argsort()

        def rows(part: Tensor) -> Tensor:
            return part.flatten(0, 1)[back_F]

        def layer(weight: Tensor, bias: Tensor | None) -> Linear:
            return rows(weight), None if bias is None else rows(bias)

        gate = None if self.gate is None else layer(self.gate, self.gate_bias)
        bias_O = None if self.bias is None else self.bias.detach().clone()
        return layer(self.up, self.up_bias), gate, (rows(self.down).t(), bias_O)

    def extra_repr(self) -> str:
        """Sizes."""
        gated = ", gated" if self.gate is not None else ""
        return f"{self.inputs}, {self.outputs}, experts={self.experts}x{self.expert_size}{gated}"


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part
