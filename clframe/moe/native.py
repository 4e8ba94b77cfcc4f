"""A sparsely gated mixture of experts, trained from scratch.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from clframe.errors import ConfigError
from clframe.moe.dispatch import Name, Plan, run, without_autocast
from clframe.moe.executors import Activation, Weights
from clframe.moe.router import Gate, TopK
from clframe.moe.routing import load_balance

BEST_TWO = TopK(k=2)


class MixtureOfExperts(nn.Module):
    """Feed-forward experts chosen for each token, and weighted, by the softmax of a linear router.

    ``y = sum over active experts of p_e / (sum of p over active experts) * E_e(x)``. Shazeer et al., "Outrageously
    Large Neural Networks" (2017), without noise. The gate is top-k or dynamic: all experts with at least ``1 - tau`` of
    the highest probability.

    Args:
        inputs: D.
        expert_size: H.
        experts: Initial E.
        outputs: O; None for the inputs' width.
        gate: Selects the active experts.
        activation: Of the hidden neurons, or of the gate branch.
        gated: Whether experts are ``down(up(x) * act(gate(x)))``.
        seed: Seed of the initial weights.

    Attributes:
        balance: Load-balancing loss of the last forward pass, differentiable: 1 for uniform use of the experts; add it
            to the loss with a weight such as 0.01.
        probability_E: Mean probability of each expert in the last forward pass.
        share_E: Fraction of tokens in the last forward pass for which each expert was active.

    Raises:
        ConfigError: A size below 1.

    >>> layer = MixtureOfExperts(6, expert_size=4, experts=3, gate=TopK(k=2))
    >>> layer(torch.ones(5, 6)).shape, float(layer.share_E.sum())
    (torch.Size([5, 6]), 2.0)
    """

    def __init__(
        self,
        inputs: int,
        *,
        expert_size: int,
        experts: int,
        outputs: int | None = None,
        gate: Gate = BEST_TWO,
        activation: Activation = torch.relu,
        gated: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        outputs = inputs if outputs is None else outputs
        for option, value in (("inputs", inputs), ("outputs", outputs), ("expert_size", expert_size)):
            if value < 1:
                raise ConfigError(f"mixture_of_experts.{option}: found {value}; give 1 or more")
        self.activation = activation
        self.choice = gate
        self.plan = Plan()
        self.executor: Name | None = None
        self.router = nn.Parameter(torch.empty(0, inputs))
        self.up = nn.Parameter(torch.empty(0, expert_size, inputs))
        self.gate = nn.Parameter(torch.empty(0, expert_size, inputs)) if gated else None
        self.up_bias = nn.Parameter(torch.empty(0, expert_size))
        self.down = nn.Parameter(torch.empty(0, expert_size, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.balance = self.probability_E = self.share_E = torch.zeros(())
        self.add_experts(experts, generator=torch.Generator().manual_seed(seed))

    def __getstate__(self) -> dict[str, Any]:
        """Detach the balance loss, so that copies do not hold the last graph."""
        return {**self.__dict__, "balance": self.balance.detach()}

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.up)

    @torch.no_grad()
    def add_experts(self, count: int, *, generator: Generator | None = None) -> bool:
        """Append experts; weights and scores of the existing ones do not change, parameters are replaced.

        Output weights of a new expert are drawn at a tenth of the usual scale, so that its contribution starts small
        but receives gradients. The softmax assigns it probability from the start.

        Args:
            count: Number of experts to add.
            generator: CPU generator for their weights.

        Returns:
            True: an optimizer created earlier refers to parameters that were replaced.

        Raises:
            ConfigError: ``count`` below 1.
        """
        if count < 1:
            raise ConfigError(f"mixture_of_experts.experts: found {count}; add 1 or more")
        added = self.experts > 0
        _, neurons, inputs = self.up.shape
        scales = {"router": inputs**-0.5, "up": (3 / inputs) ** 0.5, "gate": (3 / inputs) ** 0.5, "up_bias": 0.0}
        # Bounds of uniform distributions with variance 1 / fan-in (1 / (3 fan-in) for the router).
        scales["down"] = (3 / neurons) ** 0.5 * (0.1 if added else 1.0)
        for name, bound in scales.items():
            old = getattr(self, name)
            if old is None:
                continue
            drawn = torch.empty(count, *old.shape[1:]).uniform_(-bound, bound, generator=generator)
            grown = torch.cat([old.detach(), drawn.to(old)])
            setattr(self, name, nn.Parameter(grown, requires_grad=old.requires_grad))
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Route the tokens independently; any number of leading dimensions."""
        with without_autocast(x.device.type):
            y_NO = self._run(x.reshape(-1, x.shape[-1]).to(self.up.dtype))
        return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    def _run(self, x_ND: Tensor) -> Tensor:
        probability_NE = torch.softmax(nn.functional.linear(x_ND, self.router), 1)
        keep_NE = self.choice(probability_NE.detach())  # the selection is not differentiable
        kept_NE = probability_NE * keep_NE
        weight_NE = kept_NE / kept_NE.sum(1, keepdim=True)
        self.balance = load_balance(probability_NE, keep_NE)
        self.probability_E = probability_NE.detach().mean(0)
        self.share_E = keep_NE.to(x_ND.dtype).mean(0)
        weights = Weights(
            up_EHD=self.up,
            down_EHO=self.down,
            activation=self.activation,
            up_bias_EH=self.up_bias,
            gate_EHD=self.gate,
            bias_O=self.bias,
        )
        share = self.choice.k / self.experts if isinstance(self.choice, TopK) else None
        return run(weights, x_ND, keep_NE, weight_NE, plan=self.plan, executor=self.executor, share=share)
