"""Avalanche's strategies on Lightning Fabric, and the engines that run backward and update."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from lightning import Fabric, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from clframe.avalanche_bridge.repairs import repair
from clframe.errors import UnsupportedError


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


class OnFabric:
    """Mixin: forward, backward, update, devices and precision of an Avalanche strategy through Fabric.

    Args:
        fabric: Launched Fabric; None makes one for ``device`` (``"cpu"`` unless given) in 32 bit.
        **kwargs: What the Avalanche strategy takes; ``evaluator=None`` evaluates nothing.
    """

    # Declared for readers; Avalanche's template provides them.
    model: nn.Module
    optimizer: Any
    loss: Tensor
    mbatch: Any
    retain_graph: bool
    plugins: list[Any]

    def __init__(self, *, fabric: Fabric | None = None, **kwargs: Any) -> None:
        if fabric is None:
            fabric = default_fabric(kwargs.get("device") or "cpu")
        kwargs["device"] = fabric.device
        if kwargs.get("evaluator", ...) is None:
            kwargs["evaluator"] = _no_evaluator()
        super().__init__(**kwargs)
        self.fabric = fabric
        self._engine: Any = None
        self._served: tuple[nn.Module | None, Any] = (None, None)
        self._wraps = needs_wrapper(fabric)
        if self._wraps:
            fabric._precision.convert_module(self.model)  # here already: evaluation may come before training
        repair(self.plugins)

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Avalanche's adaptation, then Fabric's set-up of what came out of it."""
        super().check_model_and_optimizer(**kwargs)  # type: ignore[misc]
        if self.optimizer is not None:  # StreamingLDA learns without one
            self.set_up(self.model)

    def set_up(self, model: nn.Module) -> None:
        """Let Fabric set up ``model`` and the strategy's optimizer."""
        self._engine = FabricEngine(self.fabric, model, self.optimizer)
        self._served = (model, self.optimizer)

    def keep_up(self) -> None:
        """Set up anew where a plugin has put another optimizer in place since, as PackNet does."""
        model, optimizer = self._served
        if optimizer is not self.optimizer and isinstance(self._engine, FabricEngine):
            assert model is not None
            self.set_up(model)

    def _unpack_minibatch(self) -> None:
        super()._unpack_minibatch()  # type: ignore[misc]
        self.mbatch[0] = self.as_stored(self.mbatch[0])

    def forward(self, **kwargs: Any) -> Any:
        """Avalanche's forward, in Fabric's precision and through its wrapper where processes share work."""
        run = functools.partial(super().forward, **kwargs)  # type: ignore[misc]
        if self.fabric.world_size == 1 or self._engine is None:
            return self.in_precision(run)
        bare, self.model = self.model, self._engine.module
        try:
            return run()
        finally:
            self.model = bare

    def in_precision(self, run: Callable[[], Any]) -> Any:
        """``run()`` on the current batch, as Fabric's wrapped module would run it.

        The wrapper itself hides the class of the model, which tells Avalanche whether it takes task labels,
        and forbids every backward pass but Fabric's own, while plugins (MIR, for one) run theirs.
        """
        if not self._wraps:
            return run()
        self.mbatch[0] = self.as_stored(self.mbatch[0])  # a plugin may have added samples to it
        precision = self.fabric._precision
        with precision.forward_context():
            output = run()
        return precision.convert_output(output)

    def as_stored(self, x: Tensor) -> Tensor:
        """Inputs in the type that the weights are stored in: plugins and components run the model as well."""
        precision = self.fabric._precision
        if not self._wraps or precision.precision.endswith("-mixed"):  # autocast does its own casting
            return x
        converted: Tensor = precision.convert_input(x)
        return converted

    def backward(self) -> None:
        """``fabric.backward``."""
        self._engine.backward(self.loss, retain_graph=self.retain_graph)

    def optimizer_step(self) -> None:
        """The update through Fabric."""
        self.keep_up()
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


def _no_evaluator() -> Any:
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        # Avalanche advises on loggers; no evaluator means that none are wanted.
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin()


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
        name = getattr(strategy_class, "__name__", strategy_class)
        raise UnsupportedError(
            f"on_fabric: {name!r} is no Avalanche strategy class with a training loop; give a subclass of "
            f"avalanche.training.templates.BaseSGDTemplate"
        )
    return type(f"Fabric{strategy_class.__name__}", (OnFabric, strategy_class), {})
