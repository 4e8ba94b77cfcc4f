"""A feed-forward network divided into experts.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, F = E * H.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clframe.moe.dispatch import Choice, Name, Plan, choose, count_computed_pairs, run, without_autocast
from clframe.moe.executors import (
    Activation,
    Weights,
    compute_hidden,
    dense,
    dense_without,
    input_tensors,
    run_tokens,
    split_by_expert,
)

if TYPE_CHECKING:
    from typing_extensions import Self


Linear = tuple[Tensor, "Tensor | None"]
"""Weight (outputs first) and bias."""


class ExpertLayer(nn.Module):
    """Neurons of ``down(act(up(x)))``, or of ``down(up(x) * act(gate(x)))`` if gated, grouped into experts.

    The sum of all experts and the output bias equals the dense network up to rounding.

    Args:
        up: Input layer, weight_FD and bias_F.
        down: Output layer, weight_OF and bias_O.
        activation: Applied between them, or to the gate.
        experts: Number of experts; a divisor of F.
        gate: Gate layer in a gated network.
        order_F: Neurons of the dense network sorted by expert; None keeps their order.
        dropout: Dropout probability of the hidden neurons in training.

    Attributes:
        up: [E, H, D], as is ``gate``; ``up_bias`` and ``gate_bias`` are [E, H].
        down: [E, H, O], transposed so that the weights of an expert are contiguous. ``bias`` is [O].
        order_F: Index in the dense network of each neuron.
        plan: Cost model that chooses the executor.
        executor: Executor to use instead of the plan's choice.
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
        """Input width."""
        return self.up.shape[2]

    @property
    def outputs(self) -> int:
        """Output width."""
        return self.down.shape[2]

    def weights(self) -> Weights:
        """All weights without copies; cached while gradients are disabled."""
        if torch.is_grad_enabled():
            return self._all_weights()
        # Attributes of modules are slow to read, and one token does not take long. Views see every change of the
        # weights unless these moved elsewhere.
        of = self._parameters
        hooks = len(getattr(self.activation, "_forward_hooks", ()))
        where = (*map(id, of.values()), of["up"].data_ptr(), of["down"].data_ptr(), id(self.activation), hooks)  # type: ignore[union-attr]
        if self._ready is None or self._ready[0] != where:
            whole = self._all_weights()
            unwatched = type(self.activation) is nn.ReLU and not self.activation._forward_hooks
            quick = torch.relu_ if unwatched else self.activation
            ready = split_by_expert(Weights(*map(_detached, whole)))
            self._ready = (where, whole._replace(by_expert=ready, activation=quick))
        return self._ready[1]

    def _all_weights(self) -> Weights:
        return Weights(
            self.up, self.down, self.activation, self.up_bias, self.gate, self.gate_bias, self.bias
        )

    def __getstate__(self) -> dict[str, Any]:
        """Drop the cached views, which would refer to the weights of the original."""
        return {**self.__dict__, "_ready": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._ready = None  # it would keep the old weights alive
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        x_ND: Tensor,
        keep_NE: Tensor | None = None,
        weight_NE: Tensor | None = None,
        *,
        executor: Name | None = None,
        share: float | None = None,
    ) -> Tensor:
        """Compute y_NO of the active experts; ``keep_NE`` None runs all.

        See :func:`~clframe.moe.dispatch.run` for ``executor`` and ``share``. With all experts active, and on CUDA,
        autocast applies as in a dense network; otherwise it is disabled, because it would copy the weights of all
        experts for the few that run.
        """
        weights = self.weights()
        plain = keep_NE is None and torch.is_autocast_enabled(x_ND.device.type)
        dtype = self._dtype(x_ND)
        with nullcontext() if plain else without_autocast(x_ND.device.type):
            if not plain:
                weights, x_ND = weights.to(dtype), x_ND.to(dtype)
            if self._computes_all():
                dropout = self.dropout if self.training else 0.0
                return dense(weights, x_ND, keep_NE, weight_NE, dropout=dropout)
            executor = self.executor or executor
            return run(weights, x_ND, keep_NE, weight_NE, plan=self.plan, executor=executor, share=share)

    def _dtype(self, x_ND: Tensor) -> torch.dtype:
        """Dtype of routed execution: that of autocast on CUDA, where a copy of the weights takes microseconds."""
        if x_ND.is_cuda and torch.is_autocast_enabled("cuda"):
            return torch.get_autocast_dtype("cuda")
        return self.up.dtype

    def computed(
        self, x_ND: Tensor, keep_NE: Tensor | None, *, executor: Name | None = None, share: float | None = None
    ) -> int | Tensor:
        """Number of (token, expert) pairs that :meth:`forward` computes; a tensor on CUDA, to avoid synchronizing."""
        if keep_NE is None or self._computes_all():
            return len(x_ND) * self.experts
        executor = self.executor or executor
        if executor is not None:
            return count_computed_pairs(Choice(executor), keep_NE)
        dtype = self._dtype(x_ND)
        choice = choose(self.weights().to(dtype), x_ND.to(dtype), keep_NE, plan=self.plan, share=share)
        return count_computed_pairs(choice, keep_NE)

    def _computes_all(self) -> bool:
        """Whether :meth:`forward` computes all hidden neurons.

        True with dropout on them, and during training with a hook on the activation: penalties need the values of all
        neurons.
        """
        if self.training and self.dropout:
            return True
        watched = isinstance(self.activation, nn.Module) and bool(self.activation._forward_hooks)
        return watched and self.training and torch.is_grad_enabled()

    def can_run_one(self, x_1D: Tensor) -> bool:
        """Whether :meth:`run_one` supports this token: on the CPU, in evaluation mode, without overrides."""
        if torch.is_grad_enabled() or self.training or not x_1D.is_cpu or torch.is_autocast_enabled("cpu"):
            return False
        up = self._parameters["up"]
        assert up is not None
        return x_1D.dtype == up.dtype and self.executor is None and self.plan.few > 0

    def run_one(self, x_1D: Tensor, chosen: list[int]) -> Tensor:
        """Compute y_1O of one token and its active experts: the result of ``forward`` with less overhead."""
        weights = self.weights()
        experts, neurons, _ = weights.up_EHD.shape
        if 0 < len(chosen) <= self.plan.dense_threshold(neurons, threads=torch.get_num_threads()) * experts:
            return run_tokens(weights, x_1D, [chosen], None)
        return dense_without(weights, x_1D, sorted(set(range(experts)).difference(chosen)))

    @torch.no_grad()
    def norms(self, x_ND: Tensor) -> Tensor:
        """Norm of each expert's output without the output bias, norm_NE."""
        return torch.stack(
            [
                torch.linalg.vector_norm(hidden_NH @ down_HO, dim=1)
                for hidden_NH, down_HO in zip(self.hidden(x_ND).unbind(1), self.down, strict=True)
            ],
            1,
        )

    @torch.no_grad()
    def hidden(self, x_ND: Tensor) -> Tensor:
        """Compute hidden_NEH of all neurons."""
        weights = self.weights()
        flat = (None if part is None else part.flatten(0, 1) for part in input_tensors(weights))
        hidden_NF = compute_hidden(weights, x_ND, *flat)
        return hidden_NF.view(-1, self.experts, self.expert_size)

    @torch.no_grad()
    def regroup(self, order_F: Tensor) -> None:
        """Permute the neurons in place to form other experts.

        Args:
            order_F: Current indices of the neurons, sorted by new expert.
        """
        order_F = order_F.to(self.order_F.device)
        for part in (self.up, self.up_bias, self.gate, self.gate_bias, self.down):
            if part is not None:
                part.copy_(part.flatten(0, 1)[order_F].view_as(part))
        self.order_F.copy_(self.order_F[order_F])

    @torch.no_grad()
    def to_dense(self) -> tuple[Linear, Linear | None, Linear]:
        """Copies of up, gate and down in the dense network's order of neurons."""
        back_F = self.order_F.argsort()

        def rows(part: Tensor) -> Tensor:
            return part.flatten(0, 1)[back_F]

        def layer(weight: Tensor, bias: Tensor | None) -> Linear:
            return rows(weight), None if bias is None else rows(bias)

        gate = None if self.gate is None else layer(self.gate, self.gate_bias)
        bias_O = None if self.bias is None else self.bias.detach().clone()
        return layer(self.up, self.up_bias), gate, (rows(self.down).t(), bias_O)

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        gated = ", gated" if self.gate is not None else ""
        return f"{self.inputs}, {self.outputs}, experts={self.experts}x{self.expert_size}{gated}"


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part
