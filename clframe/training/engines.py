"""What runs backward and the update: Lightning Fabric, or a Lightning Trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from lightning import Fabric, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer


class Engine(Protocol):
    """Backward and update of one experience."""

    def backward(self, loss: Tensor, *, retain_graph: bool) -> None:
        """Backward through the engine's precision and strategy."""

    def step(self, *, clip: float | None) -> None:
        """Clip the gradient's norm to ``clip`` if given, then update."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which losses are computed."""


class FabricEngine:
    """Lightning Fabric: devices, precision and launch, with the loop left to its owner."""

    def __init__(self, fabric: Fabric, model: nn.Module, optimizer: Optimizer) -> None:
        self._fabric = fabric
        self.module: nn.Module = fabric.setup_module(model)
        self._optimizer: Any = fabric.setup_optimizers(optimizer)
        self._plain = not needs_wrapper(fabric)

    def backward(self, loss: Tensor, *, retain_graph: bool) -> None:
        """``fabric.backward``; in plain 32 bit that is ``loss.backward``, called without its detours."""
        if self._plain:
            loss.backward(retain_graph=retain_graph)
        else:
            self._fabric.backward(loss, retain_graph=retain_graph)

    def step(self, *, clip: float | None) -> None:
        """``fabric.clip_gradients`` without its finiteness check, which would wait for the device."""
        if clip is not None:
            self._fabric.clip_gradients(
                self.module, self._optimizer, max_norm=clip, error_if_nonfinite=False
            )
        self._optimizer.step()

    def autocast(self) -> AbstractContextManager[Any]:
        """Fabric's precision context; nothing in plain 32 bit."""
        return nullcontext() if self._plain else self._fabric.autocast()


def needs_wrapper(fabric: Fabric) -> bool:
    """Whether Fabric's wrapper changes the forward pass: other precision, or several processes."""
    return fabric.world_size > 1 or fabric._precision.precision != "32-true"


class TrainerEngine:
    """A Lightning Trainer under manual optimization."""

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    def backward(self, loss: Tensor, *, retain_graph: bool) -> None:
        """``LightningModule.manual_backward``."""
        self._module.manual_backward(loss, retain_graph=retain_graph)

    def step(self, *, clip: float | None) -> None:
        """``LightningModule.clip_gradients`` and the Trainer's optimizer step."""
        optimizer: Any = self._module.optimizers()
        if clip is not None:
            self._module.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")
        optimizer.step()

    def autocast(self) -> AbstractContextManager[Any]:
        """The Trainer runs its training step inside its own precision context already."""
        return nullcontext()
