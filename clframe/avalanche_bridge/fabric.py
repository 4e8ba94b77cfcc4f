"""Avalanche's strategies on Lightning Fabric, and the engines that run backward and update."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from lightning import Fabric, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from clframe.avalanche_bridge.repairs import repair
from clframe.device_names import usable_device
from clframe.errors import UnsupportedError


class Engine(Protocol):
    """Backward pass and update of one experience, in the precision of Fabric or of a Trainer."""

    norm: Tensor | None
    """Norm of the gradient of the last update before it was clipped; None without clipping."""

    def backward(self, loss: Tensor, *, retain_graph: bool) -> None:
        """Run the backward pass; in 16-bit mixed precision the gradients are scaled afterwards."""

    def step(self) -> bool:
        """Unscale and clip the gradients where asked for, then update.

        Returns False where the scaler of 16-bit mixed precision has left the update out, as gradients are not finite.
        """

    def skip(self) -> None:
        """Adapt the loss scale of 16-bit mixed precision to gradients that are not finite, without an update."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which losses are computed."""


class FabricEngine:
    """Backward and update through Lightning Fabric.

    Args:
        fabric: Launched.
        model: The trained module.
        optimizer: Of its parameters.
        clip: Largest norm of the gradient; None never clips.
    """

    def __init__(self, fabric: Fabric, model: nn.Module, optimizer: Optimizer, *, clip: float | None = None) -> None:
        self._fabric = fabric
        self.module: nn.Module = fabric.setup_module(model)
        self._optimizer: Any = fabric.setup_optimizers(optimizer)
        self._clip = clip
        self._plain = not needs_wrapper(fabric)
        self.norm: Tensor | None = None

    def backward(self, loss: Tensor, *, retain_graph: bool) -> None:
        """Run ``fabric.backward``; in plain 32 bit that is ``loss.backward``, called directly to save its overhead."""
        if self._plain:
            loss.backward(retain_graph=retain_graph)
        else:
            self._fabric.backward(loss, retain_graph=retain_graph)

    def step(self) -> bool:
        """Clip, which unscales first, then update."""
        if self._clip is not None:
            # error_if_nonfinite=True would synchronize with the device at every step.
            self.norm = self._fabric.clip_gradients(
                self.module, self._optimizer, max_norm=self._clip, error_if_nonfinite=False
            )
        return scaled_step(scaler_of(self._fabric._precision), self._optimizer.step)

    def skip(self) -> None:
        """Have the gradient scaler find the gradients that are not finite, if there is one: it makes no update then."""
        if scaler_of(self._fabric._precision) is not None:
            self._optimizer.step()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return Fabric's precision context; an empty one in plain 32 bit."""
        return nullcontext() if self._plain else self._fabric.autocast()


def needs_wrapper(fabric: Fabric) -> bool:
    """Whether Fabric's wrapper changes the forward pass: other precision, or several processes that it synchronizes."""
    return wraps_modules(fabric) or fabric._precision.precision != "32-true"


def wraps_modules(fabric: Fabric) -> bool:
    """Whether Fabric's strategy wraps modules to synchronize several processes."""
    return fabric.world_size > 1 and bool(getattr(fabric.strategy, "wraps_modules", True))


def scaler_of(precision: Any) -> Any:
    """Return the gradient scaler of Lightning's precision plugin; None unless it is that of 16-bit mixed precision."""
    return getattr(precision, "scaler", None)


def scaled_step(scaler: Any, step: Callable[[], Any]) -> bool:
    """Run an optimizer's step through a scaler; returns whether it was made.

    A scaler lowers its scale exactly where it leaves a step out. Reading the scale waits for the device, as the
    scaler itself does.
    """
    if scaler is None:
        step()
        return True
    before = scaler.get_scale()
    step()
    return bool(scaler.get_scale() >= before)


class TrainerEngine:
    """Backward and update in a Lightning Trainer, under manual optimization.

    Clipping is the module's ``on_before_optimizer_step``: ``LightningModule.clip_gradients`` called before
    ``optimizer.step`` would act on gradients that are still multiplied by the loss scale of 16-bit mixed precision
    (Lightning issue 18089), and unscaling them here makes the precision plugin's own ``unscale_`` raise.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self.norm: Tensor | None = None

    def backward(self, loss: Tensor, *, retain_graph: bool) -> None:
        """Run ``LightningModule.manual_backward``."""
        self._module.manual_backward(loss, retain_graph=retain_graph)

    def step(self) -> bool:
        """Run the Trainer's optimizer step, which unscales, calls ``on_before_optimizer_step`` and updates."""
        optimizer: Any = self._module.optimizers()
        made = scaled_step(scaler_of(self._module.trainer.precision_plugin), optimizer.step)
        self.norm = getattr(self._module, "norm_before_clipping", None)
        return made

    def skip(self) -> None:
        """Have the gradient scaler find the gradients that are not finite, if there is one: it makes no update then."""
        if scaler_of(self._module.trainer.precision_plugin) is not None:
            self.step()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return an empty context: a Trainer runs ``training_step`` inside its precision context already."""
        return nullcontext()


class OnFabric:
    """Mixin: forward, backward, update, devices and precision of an Avalanche strategy through Fabric.

    Args:
        fabric: Launched Fabric; None makes one for ``device`` (``"cpu"`` unless given) in 32 bit.
        **kwargs: Arguments of the Avalanche strategy; ``evaluator=None`` evaluates nothing.
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
            kwargs["evaluator"] = _empty_evaluator()
        super().__init__(**kwargs)
        self.fabric = fabric
        self.engine: Any = None
        self._clip: float | None = None
        self._set_up: tuple[nn.Module | None, Any] = (None, None)
        self._wraps = needs_wrapper(fabric)
        if self._wraps:
            fabric._precision.convert_module(self.model)  # evaluation may come before training
        repair(self.plugins)

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Adapt model and optimizer as Avalanche does, then set them up with Fabric."""
        super().check_model_and_optimizer(**kwargs)  # type: ignore[misc]
        if self.optimizer is not None:  # StreamingLDA has no optimizer
            self.set_up(self.model)

    def set_up(self, model: nn.Module, *, clip: float | None = None) -> None:
        """Set up ``model`` and the strategy's optimizer with Fabric."""
        self._clip = clip
        self.engine = FabricEngine(self.fabric, model, self.optimizer, clip=clip)
        self._set_up = (model, self.optimizer)

    def refresh_engine(self) -> None:
        """Set up again if a plugin has replaced the optimizer since, as PackNet does."""
        model, optimizer = self._set_up
        if optimizer is not self.optimizer and isinstance(self.engine, FabricEngine):
            assert model is not None
            self.set_up(model, clip=self._clip)

    def _unpack_minibatch(self) -> None:
        super()._unpack_minibatch()  # type: ignore[misc]
        self._convert_input()

    def _convert_input(self) -> None:
        """Convert the inputs of a batch that is a list, and all values of one that is a dictionary."""
        if isinstance(self.mbatch, list):
            self.mbatch[0] = self.convert_input(self.mbatch[0])
        elif isinstance(self.mbatch, Mapping):
            self.mbatch = {key: self.convert_input(value) for key, value in self.mbatch.items()}

    def forward(self, **kwargs: Any) -> Any:
        """Run Avalanche's forward in Fabric's precision, through its wrapper if several processes share the work."""
        run = functools.partial(super().forward, **kwargs)  # type: ignore[misc]
        if not wraps_modules(self.fabric) or self.engine is None:
            return self.in_precision(run)
        bare, self.model = self.model, self.engine.module
        try:
            return run()
        finally:
            self.model = bare

    def in_precision(self, run: Callable[[], Any]) -> Any:
        """Return ``run()`` on the current batch, in the precision of Fabric's wrapped module.

        The wrapper itself cannot be used: it hides the class of the model, by which Avalanche decides whether to pass
        task labels, and forbids every backward pass but Fabric's own, while plugins (MIR, for one) run theirs.
        """
        if not self._wraps:
            return run()
        self._convert_input()  # a plugin may have added samples to it
        precision = self.fabric._precision
        with precision.forward_context():
            output = run()
        return precision.convert_output(output)

    def convert_input(self, x: Any) -> Any:
        """Return inputs in the dtype of the weights: plugins and components call the model as well."""
        precision = self.fabric._precision
        if not self._wraps or precision.precision.endswith("-mixed"):  # autocast converts by itself
            return x
        return precision.convert_input(x)

    def backward(self) -> None:
        """Run the engine's backward pass."""
        self.engine.backward(self.loss, retain_graph=self.retain_graph)

    def optimizer_step(self) -> None:
        """Update through the engine."""
        self.refresh_engine()
        self.engine.step()


def default_fabric(device: Any) -> Fabric:
    """Return a launched Fabric on one device in 32 bit."""
    found = usable_device(device, where="device")
    devices: Any = 1 if found.index is None or found.type == "cpu" else [found.index]
    fabric = Fabric(accelerator=found.type, devices=devices, precision="32-true")
    fabric.launch()
    return fabric


def _empty_evaluator() -> Any:
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        # Avalanche advises to add loggers; no evaluator means that none are wanted.
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin()


@functools.cache
def on_fabric(strategy_class: type[Any]) -> type[Any]:
    """Return an Avalanche strategy class on Lightning Fabric: same arguments, same weights.

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
            f"on_fabric: found {name!r}, not an Avalanche strategy class with a training loop; give a subclass of "
            f"avalanche.training.templates.BaseSGDTemplate"
        )
    members = {"__init__": _named_init(strategy_class)}
    return type(f"Fabric{strategy_class.__name__}", (OnFabric, strategy_class), members)


def _named_init(strategy_class: type[Any]) -> Callable[..., None]:
    """An ``__init__`` with the parameters of ``strategy_class`` by name, and ``fabric``.

    Avalanche names positional arguments by the signature of the class that is called, so that
    ``Naive(model, optimizer, criterion)`` works; that of :class:`OnFabric` alone names none.
    """

    def __init__(self: Any, **kwargs: Any) -> None:
        OnFabric.__init__(self, **kwargs)

    kinds = inspect.Parameter
    signature = inspect.signature(strategy_class.__init__)
    given = [p for p in signature.parameters.values() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    named = [p if p.name == "self" else p.replace(kind=kinds.KEYWORD_ONLY) for p in given]
    fabric = kinds("fabric", kinds.KEYWORD_ONLY, default=None)
    rest = [p for p in signature.parameters.values() if p.kind is kinds.VAR_KEYWORD]
    __init__.__signature__ = signature.replace(parameters=[*named, fabric, *rest])  # type: ignore[attr-defined]
    return __init__
