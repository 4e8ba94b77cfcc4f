"""A feed-forward network that reads only the weights of active neurons for one token, and models made of them.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnsupportedError
from clframe.moe.dense import DenseFFN, find_dense_ffns
from clframe.nn.kernels import is_compiling
from clframe.sparse_decode.launch import kernels_work, run
from clframe.sparse_decode.projection import Parts, Projection, compute_active, compute_masked
from clframe.sparse_decode.rules import FACTORS, Place, Rule, Rules, require_rules
from clframe.sparsity.masking import require_weights


class SparseFFN(nn.Module):
    """``down(up(x) * act(gate(x)))``, or ``down(act(up(x)))``, without the entries that rules set to 0.

    One token on a CPU or on CUDA reads only the weights of the other entries; more tokens, autocast, gradients and
    other devices multiply the masked activations densely, with the same result up to rounding. For inference only:
    weights receive no gradients, and ``state_dict`` is refused.

    Args:
        ffn: The dense network.
        rules: One rule for the input, one for gate, up or intermediate, or both.

    Raises:
        ConfigError: Rules that cannot be combined, or of a gate that the network lacks.

    >>> from clframe.sparsity import find_ffns
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> sparse = sparse_decoder(model, {"intermediate": Rule("threshold", 0.0)})
    >>> x = torch.ones(1, 3)
    >>> torch.allclose(sparse(x), model.eval()(x))
    True
    """

    def __init__(self, ffn: DenseFFN, rules: Rules) -> None:
        super().__init__()
        require_rules(rules, gated=ffn.gate is not None, where=ffn.name)
        self.rules, self.activation = dict(rules), ffn.activation
        factor = next((place for place in FACTORS if place in rules), None)
        by_input = "input" in rules

        def store(linear: tuple[Tensor, Tensor | None], place: Place) -> Projection:
            # Rows of the second factor are skipped by output, whether or not the input is sparse too.
            return Projection(*linear, by_input=by_input and (factor is None or factor == place))

        self.up = store(ffn.up, "up")
        self.gate = None if ffn.gate is None else store(ffn.gate, "gate")
        self.down = Projection(*ffn.down, by_input=True)

    def parts(self) -> Parts:
        """Projections in the order in which they are computed."""
        if self.gate is None:
            return Parts(self.up, None, self.down, self.activation, None, self.rules)
        if "up" in self.rules:
            return Parts(self.up, self.gate, self.down, None, self.activation, self.rules)
        return Parts(self.gate, self.up, self.down, self.activation, None, self.rules)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output for x of shape (..., D).

        Raises:
            UnsupportedError: In training mode.
        """
        if self.training:
            raise UnsupportedError("sparse decode: found a model in training mode; call eval() first")
        x_TD, parts = x.reshape(-1, x.shape[-1]), self.parts()
        y_TO = self.choose(parts, x_TD)(parts, x_TD)
        return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])

    def choose(self, parts: Parts, x_TD: Tensor) -> Callable[[Parts, Tensor], Tensor]:
        """Function that computes the output of these tokens."""
        device = x_TD.device.type
        learns = torch.is_grad_enabled() and x_TD.requires_grad
        if len(x_TD) != 1 or learns or is_compiling() or torch.is_autocast_enabled(device):
            return compute_masked
        if device == "cuda":
            return run if kernels_work(parts, x_TD) else compute_masked
        return compute_active if device == "cpu" else compute_masked

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        raise UnsupportedError(
            "sparse decode: found a model for inference, whose weights are not saved; save the dense model"
        )

    def extra_repr(self) -> str:
        """Rules by place."""
        return ", ".join(f"{place}: {rule.kind} {rule.value:.4g}" for place, rule in self.rules.items())


def sparse_layers(model: nn.Module) -> dict[str, SparseFFN]:
    """Find the sparse networks of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, SparseFFN)}


def sparse_decoder(model: nn.Module, rules: Mapping[str, Rule | Mapping[str, Rule]]) -> nn.Module:
    """Copy a model, with feed-forward networks that skip inactive neurons when they compute a single token.

    The model is not changed, and its copy shares all weights except those that must be stored transposed: those of
    every last layer and, with a rule for the input, of the layers before it.

    Args:
        model: A decoder of this package or of transformers, or another model with feed-forward networks.
        rules: By place, one rule for all networks, or one for each by the names of
            :func:`~clframe.sparse_decode.calibration.calibrate`.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ConfigError: See :class:`SparseFFN`; or rules for other networks than those of the model.
        UnsupportedError: A model without feed-forward networks, or with one that cannot be replaced.
    """
    require_weights(model)
    # New parameters with the same memory: moving or casting the copy must not change those of the model.
    shared: dict[int, Any] = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    sparse = copy.deepcopy(model, shared).eval()
    ffns = find_dense_ffns(sparse)
    names = [ffn.name for ffn in ffns]
    for place, given in rules.items():
        if isinstance(given, Mapping) and set(given) != set(names):
            odd = sorted(set(given) ^ set(names))
            raise ConfigError(
                f"sparse_decode.rules: found other layers for {place} than those of the model ({', '.join(odd[:3])}); "
                f"give a rule for each of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )
    for ffn in ffns:
        own = {place: given[ffn.name] if isinstance(given, Mapping) else given for place, given in rules.items()}
        ffn.install(SparseFFN(ffn, cast(Rules, own)).eval())
    return sparse
