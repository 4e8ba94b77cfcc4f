"""Avalanche's strategies on Lightning Fabric.

:class:`OnFabric` sits in front of any Avalanche strategy class and moves its forward, backward and update
to Fabric; the loop, the plugins and the order of callbacks stay Avalanche's.
"""

from __future__ import annotations

import functools
from typing import Any

from lightning import Fabric
from torch import Tensor, nn

from clframe.errors import UnsupportedError
from clframe.training.engines import FabricEngine, needs_wrapper
from clframe.training.repairs import repair


class OnFabric:
    """Mixin: forward, backward, update, devices and precision of an Avalanche strategy through Fabric.

    Args:
        fabric: Launched Fabric; None makes one for ``device`` (``"cpu"`` unless given) in 32 bit.
        **kwargs: What the Avalanche strategy takes.
    """

    # Declared for readers; Avalanche's template provides them.
    model: nn.Module
    optimizer: Any
    loss: Tensor
    retain_graph: bool
    plugins: list[Any]

    def __init__(self, *, fabric: Fabric | None = None, **kwargs: Any) -> None:
        if fabric is None:
            fabric = default_fabric(kwargs.get("device") or "cpu")
        kwargs["device"] = fabric.device
        super().__init__(**kwargs)
        self.fabric = fabric
        self._engine: Any = None
        self._wraps = needs_wrapper(fabric)
        repair(self.plugins)

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Avalanche's adaptation, then Fabric's set-up of what came out of it."""
        super().check_model_and_optimizer(**kwargs)  # type: ignore[misc]
        self._engine = FabricEngine(self.fabric, self.model, self.optimizer)

    def forward(self) -> Any:
        """Avalanche's forward, through Fabric's wrapper where that changes anything."""
        if not self._wraps or self._engine is None:
            return super().forward()  # type: ignore[misc]
        bare, self.model = self.model, self._engine.module
        try:
            return super().forward()  # type: ignore[misc]
        finally:
            self.model = bare

    def backward(self) -> None:
        """``fabric.backward``."""
        self._engine.backward(self.loss, retain_graph=self.retain_graph)

    def optimizer_step(self) -> None:
        """The update through Fabric."""
        self._engine.step(clip=None)


def default_fabric(device: Any) -> Fabric:
    """A launched Fabric on one device in 32 bit."""
    import torch

    place = torch.device(device)
    devices: Any = 1 if place.index is None else [place.index]
    if place.type == "cpu":
        devices = 1
    fabric = Fabric(accelerator=place.type, devices=devices, precision="32-true")
    fabric.launch()
    return fabric


@functools.cache
def on_fabric(strategy_class: type[Any]) -> type[Any]:
    """Any Avalanche strategy class, on Lightning Fabric: same arguments, same weights.

    ::

        from avalanche.training import DER
        strategy = on_fabric(DER)(model=model, optimizer=optimizer, mem_size=200, ...)

    Raises:
        UnsupportedError: Not an Avalanche strategy with a training loop.
    """
    from avalanche.training.templates import BaseSGDTemplate

    if not (isinstance(strategy_class, type) and issubclass(strategy_class, BaseSGDTemplate)):
        raise UnsupportedError(
            f"on_fabric: {strategy_class!r} is no Avalanche strategy with a training loop; give a subclass of "
            f"avalanche.training.templates.BaseSGDTemplate"
        )
    return type(f"Fabric{strategy_class.__name__}", (OnFabric, strategy_class), {})
