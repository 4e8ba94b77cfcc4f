"""What is broken in Avalanche 0.6 on current torch, mended or refused before it spoils a run.

Each repair touches only the class in question, when a strategy that uses it is built, and may go when
Avalanche has released the fix.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from clframe.errors import UnsupportedError
from clframe.nn.network import Network


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


def refuse_schedulers(plugins: Iterable[Any]) -> None:
    """Refuse learning-rate schedulers where every experience gets a fresh optimizer: they would do nothing.

    Raises:
        UnsupportedError: An ``LRSchedulerPlugin`` among the plugins.
    """
    from avalanche.training.plugins import LRSchedulerPlugin

    if any(isinstance(plugin, LRSchedulerPlugin) for plugin in plugins):
        raise UnsupportedError(
            "LRSchedulerPlugin: its scheduler belongs to one optimizer but each experience gets a fresh one; "
            "pass optimizer= to the strategy, or scheduler= to the ContinualModule"
        )


@functools.cache
def _mend_synaptic_intelligence() -> None:
    """Its ``extract_weights`` keeps ``param.detach().cpu().flatten()``: on CPU a view of the live weights.

    Old and new weights are then always equal, every importance is zero and the plugin does nothing. It also
    squares tensors with numpy, which warns that it will stop to work.
    """
    from avalanche.training.plugins import synaptic_intelligence

    _mend_growing_importances()
    plugin = synaptic_intelligence.SynapticIntelligencePlugin

    @torch.no_grad()
    def extract_weights(model: nn.Module, target: dict[str, Any], excluded_parameters: set[str]) -> None:
        for name, param in plugin.allowed_parameters(model, excluded_parameters):
            target[name].data = param.detach().cpu().flatten().clone()

    plugin.extract_weights = staticmethod(extract_weights)
    synaptic_intelligence.np = SimpleNamespace(square=torch.square)


@functools.cache
def _mend_growing_importances() -> None:
    """``ParamData.expand`` indexes with a list of slices, which torch warns it will read as a tensor."""
    from avalanche.training.utils import ParamData

    def expand(self: Any, new_shape: Any, padding_fn: Any = torch.zeros) -> torch.Tensor:
        sizes = list(zip(new_shape, self.shape, strict=True))
        assert all(new >= old for new, old in sizes), "shapes only grow"
        data: torch.Tensor = self._data
        if any(new > old for new, old in sizes):
            self.reset_like(new_shape, init_function=padding_fn)
            self._data[tuple(slice(size) for size in data.shape)] = data
        return self._data  # type: ignore[no-any-return]

    ParamData.expand = expand


@functools.cache
def _mend_bic() -> None:
    """It passes ``verbose=`` to ``MultiStepLR``, an argument that torch 2.7 removed.

    It also sets ``experience.dataset``, which experiences of Avalanche's newer benchmarks do not allow.
    """
    from avalanche.training.plugins import bic
    from torch.optim.lr_scheduler import MultiStepLR

    def multi_step(optimizer: Any, milestones: Any, *, gamma: float, verbose: bool = False) -> MultiStepLR:
        return MultiStepLR(optimizer, milestones, gamma=gamma)

    bic.MultiStepLR = multi_step
    hold_out = bic.BiCPlugin.before_train_dataset_adaptation

    def before_train_dataset_adaptation(self: Any, strategy: Any, **kwargs: Any) -> None:
        strategy.experience = _with_settable_dataset(strategy.experience)
        hold_out(self, strategy, **kwargs)

    bic.BiCPlugin.before_train_dataset_adaptation = before_train_dataset_adaptation


def _with_settable_dataset(experience: Any) -> Any:
    """``experience``, or a copy of it whose dataset can be set, where its own cannot."""
    dataset = getattr(type(experience), "dataset", None)
    if not isinstance(dataset, property) or dataset.fset is not None:
        return experience
    settable = copy.copy(experience)

    def set_dataset(self: Any, data: Any) -> None:
        self._dataset = data

    original = type(experience)
    settable.__class__ = type(original.__name__, (original,), {"dataset": dataset.setter(set_dataset)})
    return settable


@functools.cache
def _mend_cwr_star() -> None:
    """It takes the last ``nn.Linear`` for the classifier: in a network of ours a hidden layer, which it sets to 0."""
    from avalanche.training.plugins.cwr_star import CWRStarPlugin

    find = CWRStarPlugin.get_cwr_layer

    def get_cwr_layer(self: Any) -> Any:
        network = getattr(self.model, "network", None)
        return network.final if self.cwr_layer_name is None and isinstance(network, Network) else find(self)

    CWRStarPlugin.get_cwr_layer = get_cwr_layer


def _check_gem() -> None:
    """It solves with quadprog, which Avalanche does not install on its own everywhere."""
    import qpsolvers

    if "quadprog" not in qpsolvers.available_solvers:
        raise UnsupportedError(
            "GEMPlugin: needs the quadratic-programming solver quadprog, which is not installed; "
            "run pip install quadprog"
        )


_PLUGINS = "avalanche.training.plugins"
_REPAIRS: dict[str, Callable[[], None]] = {
    f"{_PLUGINS}.ewc.EWCPlugin": _mend_growing_importances,
    f"{_PLUGINS}.rwalk.RWalkPlugin": _mend_growing_importances,
    f"{_PLUGINS}.mas.MASPlugin": _mend_growing_importances,
    f"{_PLUGINS}.synaptic_intelligence.SynapticIntelligencePlugin": _mend_synaptic_intelligence,
    f"{_PLUGINS}.bic.BiCPlugin": _mend_bic,
    f"{_PLUGINS}.cwr_star.CWRStarPlugin": _mend_cwr_star,
    f"{_PLUGINS}.gem.GEMPlugin": _check_gem,
}
