"""What is broken in Avalanche 0.6 on current torch, mended or refused before it spoils a run.

Each repair touches only the class in question, when a strategy that uses it is built, and may go when
Avalanche has released the fix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from clframe.errors import UnsupportedError


def repair(plugins: Iterable[Any]) -> None:
    """Mend the plugins that can be mended and refuse those that cannot work here.

    Raises:
        UnsupportedError: GEM without the solver it names.
    """
    for plugin in plugins:
        for base in type(plugin).__mro__:
            action = _REPAIRS.get(f"{base.__module__}.{base.__name__}")
            if action is not None:
                action()


def _mend_synaptic_intelligence() -> None:
    """Its ``extract_weights`` keeps ``param.detach().cpu().flatten()``: on CPU a view of the live weights.

    Old and new weights are then always equal, every importance is zero and the plugin does nothing.
    """
    from avalanche.training.plugins import SynapticIntelligencePlugin
    from avalanche.training.plugins.synaptic_intelligence import SynapticIntelligencePlugin as Plugin

    def extract_weights(model: torch.nn.Module, target: dict[str, Any], excluded_parameters: set[str]) -> None:
        for name, param in Plugin.allowed_parameters(model, excluded_parameters):
            target[name].data = param.detach().cpu().flatten().clone()

    SynapticIntelligencePlugin.extract_weights = staticmethod(torch.no_grad()(extract_weights))


def _mend_bic() -> None:
    """It passes ``verbose=`` to ``MultiStepLR``, an argument that torch 2.7 removed."""
    from avalanche.training.plugins import bic
    from torch.optim.lr_scheduler import MultiStepLR

    def multi_step(optimizer: Any, milestones: Any, *, gamma: float, verbose: bool = False) -> MultiStepLR:
        return MultiStepLR(optimizer, milestones, gamma=gamma)

    bic.MultiStepLR = multi_step


def _check_gem() -> None:
    """It solves with quadprog, which Avalanche does not install on its own everywhere."""
    import qpsolvers

    if "quadprog" not in qpsolvers.available_solvers:
        raise UnsupportedError(
            "GEMPlugin: needs the quadratic-programming solver quadprog, which is not installed; "
            "run pip install quadprog"
        )


_REPAIRS = {
    "avalanche.training.plugins.synaptic_intelligence.SynapticIntelligencePlugin": _mend_synaptic_intelligence,
    "avalanche.training.plugins.bic.BiCPlugin": _mend_bic,
    "avalanche.training.plugins.gem.GEMPlugin": _check_gem,
}
