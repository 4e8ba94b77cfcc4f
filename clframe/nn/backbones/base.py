"""Backbones as named stages with taps, and dry runs that infer tap shapes of modules from other libraries.

Dry runs have no side effects: training flags, batch-norm statistics and random states are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.nn.backbones.traced import default_layers, has_same_gradients, trace_stages
from clframe.nn.backbones.traced_graph import BATCHES, starts_in_place
from clframe.registry import Registry, call_problem

Flow = Tensor | tuple[Tensor, ...]
"""Value passed from stage to stage: the tap, alone or followed by further tensors such as an attention mask."""
Stages = Sequence[tuple[str, nn.Module]]
"""``(name, module)`` in order of execution."""
ShapedStage = tuple[str, nn.Module, tuple[int, ...]]
"""``(name, module, tap shape)``, one stage of a backbone."""

_SAMPLES = 2
"""Batch size of a dry run; 1 would not reveal a stage that swaps batch and channels."""


def tap_of(value: Flow) -> Tensor:
    """The tap in the value of a stage."""
    return value if isinstance(value, Tensor) else value[0]


def infer_shapes(
    stages: Stages, input_shape: tuple[int, ...], *, where: str, compute: bool = False
) -> list[ShapedStage]:
    """Infer tap shapes by a dry run on two samples of zeros in evaluation mode.

    A stage that writes into its input, such as an in-place ReLU, would change the previous tap. It is merged with the
    stages whose taps it overwrites into one stage of its name.

    Args:
        stages: The stages to run.
        input_shape: Shape of one sample.
        where: Prefix of messages.
        compute: Run on the device of the weights. By default the run is on torch's meta device and costs next to
            nothing at any size, but modules whose forward depends on values fail there.

    Raises:
        ConfigError: A stage that fails or whose output has no batch dimension, or a first stage that writes into the
            batch.

    >>> layers = [("0", nn.Conv2d(1, 4, 3)), ("1", nn.ReLU(inplace=True)), ("2", nn.Flatten())]
    >>> [(name, shape) for name, _, shape in infer_shapes(layers, (1, 5, 5), where="mine")]
    [('1', (4, 3, 3)), ('2', (36,))]
    """
    x = torch.zeros(_SAMPLES, *input_shape, device=None if compute else "meta")
    if compute:
        x = _match_parameters(x, [stage for _, stage in stages])
    merged: list[tuple[int, ShapedStage]] = []
    call = _run if compute else _run_on_meta
    for index, (name, stage, shape, first) in enumerate(_dry_run(stages, x, call=call, where=where)):
        parts = [stage]
        if first == 0:
            raise ConfigError(f"{where}: stage '{name}' writes into the batch; make it work out of place")
        while merged and first is not None and merged[-1][0] >= first:
            parts.insert(0, merged.pop()[1][1])
        merged.append((index + 1, (name, parts[0] if len(parts) == 1 else nn.Sequential(*parts), shape)))
    return [entry for _, entry in merged]


def is_equivalent(model: nn.Module, stages: Sequence[nn.Module], input_shape: tuple[int, ...]) -> bool:
    """Whether the stages compute the same as ``model`` (up to rounding) on one random sample."""
    # Models of token ids round this noise down to the id 0.
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    x = _match_parameters(noise, [model])
    with preserving_state([model, *stages]):
        whole = model(x.clone())  # cloned, because a module may write into its input
        value = x
        for stage in stages:
            value = stage(value)
    if not isinstance(whole, Tensor) or not isinstance(value, Tensor) or whole.numel() != value.numel():
        return False
    return torch.allclose(whole.flatten(), value.flatten(), rtol=1e-4, atol=1e-5)


@contextmanager
def preserving_state(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random states are restored at the end."""
    training = {part: part.training for module in modules for part in module.modules()}
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    try:
        for module in modules:
            module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for part, flag in training.items():
            part.training = flag


class _Ran(NamedTuple):
    name: str
    stage: nn.Module
    shape: tuple[int, ...]
    first: int | None
    """Index of the first value that it overwrites: 0 is the batch, k the output of stage k; None if there is none."""


def _dry_run(stages: Stages, x: Tensor, *, call: Callable[[nn.Module, Any], Any], where: str) -> Iterator[_Ran]:
    value: Any = x
    seen: list[tuple[Tensor, int]] = []
    with preserving_state([stage for _, stage in stages]):
        for index, (name, stage) in enumerate(stages):
            before = tap_of(value)
            seen.append((before, before._version))
            try:
                value = call(stage, value)
            except Exception as error:  # foreign modules raise anything; the message must name the stage
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"{where}: stage '{name}' fails on inputs of shape {tuple(before.shape[1:])} ({reason}); "
                    f"give stages that accept each other's outputs"
                ) from error
            shape = _check_shape(value, name=name, last=index == len(stages) - 1, where=where)
            # A version counts the writes to a tensor and to every view of it.
            written = [k for k, (tap, version) in enumerate(seen) if tap._version != version]
            seen = [(tap, tap._version) for tap, _ in seen]
            if not written and starts_in_place(stage):
                written = [index]
            yield _Ran(name, stage, shape, written[0] if written else None)


def _run(stage: nn.Module, value: Any) -> Any:
    return stage(value)


def _run_on_meta(stage: nn.Module, value: Any) -> Any:
    """Run a stage on the meta device; its weights are not moved."""
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    return functional_call(stage, {name: tensor.to("meta") for name, tensor in tensors}, (value,))


def _check_shape(value: Any, *, name: str, last: bool, where: str) -> tuple[int, ...]:
    tap = value[0] if isinstance(value, tuple) and value and not last else value
    if not isinstance(tap, Tensor):
        wanted = "a tensor" if last else "a tensor or (tap, ...)"
        raise ConfigError(f"{where}: stage '{name}' returns {type(value).__name__}; return {wanted}")
    if tap.ndim < 2 or tap.shape[0] != _SAMPLES:
        raise ConfigError(
            f"{where}: stage '{name}' returns shape {tuple(tap.shape)} for {_SAMPLES} samples; keep the batch first"
        )
    return tuple(tap.shape[1:])


def _match_parameters(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``x`` with the dtype and device of the first floating-point parameter."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return x.to(device=parameter.device, dtype=parameter.dtype)
    return x


class Backbone(nn.Module):
    """A sequence of named stages that ends in a flat feature vector.

    A stage returns its tap, or ``(tap, *carried)``, where the carried tensors, such as an attention mask, have the
    batch first and are passed to the next stage; the last stage returns its tap alone. Taps of convolutional networks
    are (channels, height, width), those of transformers (tokens, width).

    Args:
        stages: ``(name, module, tap shape)`` in order, with the shape for one sample. A later stage must not write into
            its input.
        input_shape: Shape of one sample, such as (channels, height, width).
        vocabulary: Number of token ids of a language model, see below; 0 for other backbones.
        tied: Whether its classifiers share the weights of the embedding, the only one of its first stage.

    The samples of a language model are windows of ids: its first stage leaves out the last id, which is only a target,
    and every tap is (tokens, width). Its network computes one row of logits over the vocabulary for each token.

    Attributes:
        names: Names of the stages and of their taps. They may contain dots.
        stages: The modules, in the order of ``names``.
        tap_shapes: Declared shape of each tap, without the batch.
        input_shape: Shape of one input sample.

    Raises:
        ConfigError: No stages, a duplicate name, or a last tap that is not flat (of a language model: not tokens).

    >>> stages = [("flat", nn.Flatten(), (12,)), ("out", nn.Linear(12, 5), (5,))]
    >>> net = Backbone(stages, input_shape=(3, 2, 2))
    >>> net.names, net.features, net.tap("out")
    (('flat', 'out'), 5, 1)
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, nn.Module, tuple[int, ...]]],
        *,
        input_shape: tuple[int, ...],
        vocabulary: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.names: tuple[str, ...] = tuple(name for name, _, _ in stages)
        self.tap_shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, _, shape in stages}
        self.input_shape: tuple[int, ...] = tuple(input_shape)
        self.vocabulary = vocabulary
        self.tied = tied
        if not stages:
            raise ConfigError("backbone: found no stages; give at least one")
        if len(self.tap_shapes) != len(stages):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ConfigError(f"backbone: found stage '{twice}' twice; give every stage its own name")
        if len(self.tap_shapes[self.names[-1]]) != (2 if vocabulary else 1):
            last, shape = self.names[-1], self.tap_shapes[self.names[-1]]
            wanted = "(tokens, width)" if vocabulary else "a flat vector"
            raise ConfigError(f"backbone: found last tap '{last}' of shape {shape}; end in {wanted}")
        self.stages = nn.ModuleList(module for _, module, _ in stages)

    @classmethod
    def of(
        cls,
        model: nn.Module | Iterable[tuple[str, nn.Module]],
        *,
        input_shape: tuple[int, ...],
        depth: int = 1,
        taps: Sequence[str] = (),
    ) -> Backbone:
        """Make a backbone from any layers; tap shapes come from a dry run.

        Stages that write into their input are merged with the previous stage (see
        :func:`~clframe.nn.backbones.base.infer_shapes`); if the last tap is not flat, a stage ``flat`` is added.

        Args:
            model: A module; names of its children become names of stages. One that does more than run its children in
                order, which is checked on random numbers, is traced by torch.fx and divided after those of its blocks
                through which every path leads. Or ``(name, module)`` pairs. Leave out the classifier: the network adds
                its own.
            input_shape: Shape of one sample.
            depth: Levels of nested ``nn.Sequential`` children to expand: with 2, ``layer1`` becomes ``layer1.0``,
                ``layer1.1``, and so on.
            taps: Names of layers, such as ``layer2.1``: the model is traced and divided after these, and nowhere else.

        Raises:
            ConfigError: A stage that fails or drops the batch dimension, a model that cannot be traced, or a tap that
                is not on every path from the inputs to the features.
            UnknownNameError: A tap that the model does not have.

        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        >>> Backbone.of(net, input_shape=(3, 32, 32)).tap_shapes
        {'0': (8, 30, 30), '1': (8, 30, 30), '2': (8, 2, 2), 'flat': (32,)}
        """
        require_at_least(depth, 1, where="backbone: depth")
        if not isinstance(model, nn.Module):
            if taps:
                raise ConfigError("backbone: found taps for stages in pairs; give the module that contains the layers")
            return cls._of_stages(infer_shapes(list(model), input_shape, where="backbone", compute=True), input_shape)
        if taps:
            return cls.traced(model, input_shape=input_shape, taps=taps)
        stages = list(_expand(model, depth))
        if type(model) is nn.Sequential:
            return cls._of_stages(infer_shapes(stages, input_shape, where="backbone", compute=True), input_shape)
        try:
            shaped = infer_shapes(stages, input_shape, where="backbone", compute=True)
        except ConfigError:  # the children do not accept each other's outputs
            shaped = []
        if shaped and is_equivalent(model, [stage for _, stage, _ in shaped], input_shape):
            return cls._of_stages(shaped, input_shape)
        return cls.traced(model, input_shape=input_shape, defaults=default_layers(model, depth=depth))

    @classmethod
    def traced(
        cls,
        model: nn.Module,
        *,
        input_shape: tuple[int, ...],
        taps: Sequence[str] = (),
        defaults: Sequence[str] = (),
        where: str = "backbone",
    ) -> Backbone:
        """Make a backbone from a model whose forward torch.fx traces, see :func:`~.traced.trace_stages`.

        Args:
            model: The model.
            input_shape: Shape of one sample.
            taps: Names of layers after which it is divided.
            defaults: Further ones, left out where that is impossible.
            where: Prefix of messages.

        Raises:
            ConfigError: A model that cannot be traced, or cannot be divided after one of the taps.
            UnknownNameError: A tap that the model does not have.
        """
        noise = torch.rand(max(BATCHES), *input_shape, generator=torch.Generator().manual_seed(0))
        x, training = _match_parameters(noise, [model]), model.training
        with preserving_state([model]):
            stages = trace_stages(model, taps, x, where=where, defaults=defaults)
            parts = [stage for _, stage in stages]
            if not is_equivalent(model, parts, input_shape) or not has_same_gradients(model, parts, x):
                found = f"{where}: the traced forward of {type(model).__name__} differs from the model"
                raise ConfigError(
                    f"{found}; give (name, module) pairs to Backbone.of, or use torch.no_grad() inside of layers only"
                )
        for _, stage in stages:
            stage.training = training  # of the stage alone: the layers in it have their own
        return cls._of_stages(infer_shapes(stages, input_shape, where=where, compute=True), input_shape)

    @classmethod
    def _of_stages(cls, stages: list[ShapedStage], input_shape: tuple[int, ...]) -> Backbone:
        """A backbone of the stages; one that flattens the last tap is added where it is not flat."""
        if not stages:
            raise ConfigError("backbone: found no stages; give at least one")
        shape = stages[-1][2]
        flat = [] if len(shape) == 1 else [("flat", nn.Flatten(), (prod(shape),))]
        return cls([*stages, *flat], input_shape=input_shape)

    @property
    def features(self) -> int:
        """Width of the last tap."""
        return self.tap_shapes[self.names[-1]][-1]

    @property
    def embedding(self) -> nn.Parameter | None:
        """Weights that the classifiers share; None if they have their own."""
        if not self.tied:
            return None
        (weight,) = (part.weight for part in self.stages[0].modules() if isinstance(part, nn.Embedding))
        assert isinstance(weight, nn.Parameter)
        return weight

    def tap(self, name: str, *, where: str = "") -> int:
        """Index of the stage ``name``; an unknown one is an UnknownNameError that names ``where`` and the nearest."""
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownNameError(unknown_name("tap", name, self.names, where=where)) from None

    def forward(self, x: Tensor) -> Tensor:
        """Compute features_BF, the last tap."""
        for stage in self.stages:
            x = stage(x)
        return x


def _expand(model: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(), which yields a layer that is used twice only once.
    for name, child in model._modules.items():
        if child is None:
            continue
        if depth > 1 and isinstance(child, nn.Sequential) and len(child):
            yield from ((f"{name}.{inner}", part) for inner, part in _expand(child, depth - 1))
        else:
            yield name, child


def he_initialize(backbone: Backbone, *, fan: Literal["fan_in", "fan_out"]) -> Backbone:
    """Initialize weights from N(0, 2 / fan) and biases with zero, in place (He et al., 2015).

    Torch's defaults shrink the signal by a factor of about 2.4 per ReLU layer, with which networks without
    normalization learn next to nothing in the first epoch on small data.
    """
    for part in backbone.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(part.weight, mode=fan, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return backbone


def require_at_least(value: int, minimum: int, *, where: str) -> None:
    """Raise :class:`ConfigError` if ``value`` is below ``minimum``.

    >>> require_at_least(0, 1, where="mlp.width")
    Traceback (most recent call last):
    clframe.errors.ConfigError: mlp.width: found 0; give 1 or more
    """
    if value < minimum:
        raise ConfigError(f"{where}: found {value}; give {minimum} or more")


MOST_LAYERS = 1000
"""Bound on options that count layers, so that a typing error is refused instead of building layers for hours."""


def require_depth(depth: int, *, where: str, least: int = 1) -> None:
    """Raise :class:`ConfigError` if a number of layers is below ``least`` or above :data:`MOST_LAYERS`.

    >>> require_depth(10**9, where="mlp.depth")
    Traceback (most recent call last):
    clframe.errors.ConfigError: mlp.depth: found 1000000000; give 1000 or less
    """
    require_at_least(depth, least, where=where)
    if depth > MOST_LAYERS:
        raise ConfigError(f"{where}: found {depth}; give {MOST_LAYERS} or less")


def require_image(input_shape: tuple[int, ...], minimum: int, *, where: str) -> tuple[int, int, int]:
    """Return the input shape as (channels, height, width); both sides need ``minimum`` pixels.

    Raises:
        ConfigError: Not an image, no channels, or an image too small for the backbone.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ConfigError(f"{where}: found inputs of shape {input_shape}; give (channels, height, width)")
    channels, height, width = input_shape
    if min(height, width) < minimum:
        raise ConfigError(
            f"{where}: found images of {height}x{width}; use at least {minimum}x{minimum} or another backbone"
        )
    return channels, height, width


def load_backbone(point: EntryPoint) -> Iterator[tuple[str, Callable[..., Backbone]]]:
    """The backbone of an entry point: its name, and the function it points to."""
    yield point.name, point.load()


def _problem(entry: Callable[..., Backbone]) -> str:
    return call_problem(entry, ("input_shape",), expected="a function (input_shape, *, options) -> Backbone")


BACKBONES: Registry[Callable[..., Backbone]] = Registry(
    "backbone", group="clframe.backbones", load=load_backbone, problem=_problem, own=True
)
"""Every backbone by name: functions ``(input_shape, *, options) -> Backbone``."""
