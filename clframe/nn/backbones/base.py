"""Taps and their shapes: what a stage returns, and dry runs that find the shapes of modules from other libraries.

Neither dry run leaves a trace: training flags, batch-norm statistics and random states stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clframe.errors import ConfigError, UnknownNameError, unknown_name

Flow = Tensor | tuple[Tensor, ...]
"""What goes from stage to stage: the tap, alone or followed by what travels with it (an attention mask)."""
Stages = Sequence[tuple[str, nn.Module]]
"""``(name, module)`` in the order in which they run."""
Shaped = tuple[str, nn.Module, tuple[int, ...]]
"""``(name, module, tap shape)``, what a backbone is made of."""

_SAMPLES = 2
"""Samples of a dry run; with one, a stage that mixes up batch and channels would go unnoticed."""


def tap_of(value: Flow) -> Tensor:
    """The tap in what a stage returns."""
    return value if isinstance(value, Tensor) else value[0]


def shaped(stages: Stages, input_shape: tuple[int, ...], *, where: str, compute: bool = False) -> list[Shaped]:
    """The stages with their tap shapes, found by a dry run on two samples of zeros in eval mode.

    A stage that writes into its input, such as an in-place ReLU, would change the tap before it: it is joined
    to the stages whose taps it writes into, and together they bear its name.

    Args:
        stages: What to run.
        input_shape: Shape of one sample.
        where: What messages begin with.
        compute: Run for real, where the weights are. By default the run is on torch's meta device and costs
            next to nothing at any size, which modules that look at values cannot take.

    Raises:
        ConfigError: A stage that fails, that returns no tensor with the batch first, or a first stage that
            writes into the batch.

    >>> layers = [("0", nn.Conv2d(1, 4, 3)), ("1", nn.ReLU(inplace=True)), ("2", nn.Flatten())]
    >>> [(name, shape) for name, _, shape in shaped(layers, (1, 5, 5), where="mine")]
    [('1', (4, 3, 3)), ('2', (36,))]
    """
    x = torch.zeros(_SAMPLES, *input_shape, device=None if compute else "meta")
    if compute:
        x = _like_parameters(x, [stage for _, stage in stages])
    joined: list[tuple[int, Shaped]] = []
    call = _run if compute else _on_meta
    for place, (name, stage, shape, first) in enumerate(_dry_run(stages, x, call=call, where=where)):
        parts = [stage]
        if first == 0:
            raise ConfigError(f"{where}: stage '{name}' writes into the batch; make it work out of place")
        while joined and first is not None and joined[-1][0] >= first:
            parts.insert(0, joined.pop()[1][1])
        joined.append((place + 1, (name, parts[0] if len(parts) == 1 else nn.Sequential(*parts), shape)))
    return [entry for _, entry in joined]


def same_function(model: nn.Module, stages: Sequence[nn.Module], input_shape: tuple[int, ...]) -> bool:
    """Whether the stages, run in order, compute what ``model`` does (to rounding), on one random sample."""
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))  # rounded down, the id 0
    x = _like_parameters(noise, [model])
    with untouched([model, *stages]):
        whole = model(x.clone())  # a module that writes into its input must not change what the other one sees
        value = x
        for stage in stages:
            value = stage(value)
    if not isinstance(whole, Tensor) or not isinstance(value, Tensor) or whole.numel() != value.numel():
        return False
    return torch.allclose(whole.flatten(), value.flatten(), rtol=1e-4, atol=1e-5)


@contextmanager
def untouched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients; training flags and random states are put back."""
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
    """The first value it writes into: 0 is the batch, k what the k-th stage returns; None where it writes into none."""


def _dry_run(stages: Stages, x: Tensor, *, call: Callable[[nn.Module, Any], Any], where: str) -> Iterator[_Ran]:
    value: Any = x
    seen: list[tuple[Tensor, int]] = []
    with untouched([stage for _, stage in stages]):
        for place, (name, stage) in enumerate(stages):
            before = tap_of(value)
            seen.append((before, before._version))
            try:
                value = call(stage, value)
            except Exception as error:  # whatever a foreign module raises, its user needs to know which one
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"{where}: stage '{name}' fails on inputs of shape {tuple(before.shape[1:])} ({reason}); "
                    f"give stages that take each other's outputs"
                ) from error
            shape = _shape(value, name=name, last=place == len(stages) - 1, where=where)
            # A version counts the writes to a tensor and to every view of it.
            written = [index for index, (tap, version) in enumerate(seen) if tap._version != version]
            seen = [(tap, tap._version) for tap, _ in seen]
            if not written and _in_place(stage):
                written = [place]
            yield _Ran(name, stage, shape, written[0] if written else None)


def _run(stage: nn.Module, value: Any) -> Any:
    return stage(value)


def _on_meta(stage: nn.Module, value: Any) -> Any:
    """The stage's output without its numbers; its weights stay where they are."""
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    return functional_call(stage, {name: tensor.to("meta") for name, tensor in tensors}, (value,))


def _shape(value: Any, *, name: str, last: bool, where: str) -> tuple[int, ...]:
    tap = value[0] if isinstance(value, tuple) and value and not last else value
    if not isinstance(tap, Tensor):
        wanted = "a tensor" if last else "a tensor or (tap, ...)"
        raise ConfigError(f"{where}: stage '{name}' returns {type(value).__name__}; return {wanted}")
    if tap.ndim < 2 or tap.shape[0] != _SAMPLES:
        raise ConfigError(
            f"{where}: stage '{name}' returns shape {tuple(tap.shape)} for {_SAMPLES} samples; keep the batch first"
        )
    return tuple(tap.shape[1:])


def _in_place(stage: nn.Module) -> bool:
    """Whether the stage begins with a layer that says so: dropout writes only where it trains."""
    while isinstance(stage, nn.Sequential) and len(stage):
        stage = stage[0]
    return getattr(stage, "inplace", False) is True


def _like_parameters(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``x`` in the type and on the device of the first floating-point parameter."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return x.to(device=parameter.device, dtype=parameter.dtype)
    return x


class Backbone(nn.Module):
    """Named stages run one after the other; the last one ends in a flat feature vector.

    A stage returns its tap, or ``(tap, *carried)``, where what is carried (an attention mask, say) has the
    batch first and travels to the next stage; the last one returns its tap alone. A tap of a convolutional
    net is (channels, height, width), one of a transformer on tokens (tokens, width).

    Args:
        stages: ``(name, module, tap shape)`` in order. The shape is that of one sample's output. A later
            stage must not write into its input.
        input_shape: Shape of one sample, such as (channels, height, width).

    Attributes:
        names: Stage names, which are also the names of the taps. They may hold dots.
        stages: The modules, in the order of ``names``.
        tap_shapes: Declared shape of each tap, without the batch.
        input_shape: Shape of one input sample.

    Raises:
        ConfigError: No stages, a name twice, or a last tap that is not flat.

    >>> stages = [("flat", nn.Flatten(), (12,)), ("out", nn.Linear(12, 5), (5,))]
    >>> net = Backbone(stages, input_shape=(3, 2, 2))
    >>> net.names, net.features, net.tap("out")
    (('flat', 'out'), 5, 1)
    """

    def __init__(
        self, stages: Sequence[tuple[str, nn.Module, tuple[int, ...]]], *, input_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.names: tuple[str, ...] = tuple(name for name, _, _ in stages)
        self.tap_shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, _, shape in stages}
        self.input_shape: tuple[int, ...] = tuple(input_shape)
        if not stages:
            raise ConfigError("backbone: found no stages; give at least one")
        if len(self.tap_shapes) != len(stages):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ConfigError(f"backbone: found stage '{twice}' twice; give every stage its own name")
        if len(self.tap_shapes[self.names[-1]]) != 1:
            last, shape = self.names[-1], self.tap_shapes[self.names[-1]]
            raise ConfigError(f"backbone: found last tap '{last}' of shape {shape}; end in a flat vector")
        self.stages = nn.ModuleList(module for _, module, _ in stages)

    @classmethod
    def of(
        cls,
        model: nn.Module | Iterable[tuple[str, nn.Module]],
        *,
        input_shape: tuple[int, ...],
        depth: int = 1,
    ) -> Backbone:
        """A backbone from layers of your own; tap shapes come from a dry run that leaves no trace.

        Stages that write into their input are joined to the stage before them (see
        :func:`~clframe.nn.backbones.base.shaped`); where the last tap is not flat, a stage ``flat`` follows.

        Args:
            model: An ``nn.Sequential``, or another module that does no more than run its children in order,
                which is checked on random numbers; the children's names become the stages'. Or
                ``(name, module)`` pairs. No classifier: the network adds its own.
            input_shape: Shape of one sample.
            depth: How deep ``nn.Sequential`` children are opened: with 2, ``layer1`` becomes ``layer1.0``,
                ``layer1.1``, and so on.

        Raises:
            ConfigError: A stage that fails or drops the batch, or a module that does more than run its
                children in order.

        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        >>> Backbone.of(net, input_shape=(3, 32, 32)).tap_shapes
        {'0': (8, 30, 30), '1': (8, 30, 30), '2': (8, 2, 2), 'flat': (32,)}
        """
        require_at_least(depth, 1, where="backbone: depth")
        stages = list(_opened(model, depth) if isinstance(model, nn.Module) else model)
        if not stages:
            raise ConfigError("backbone: found no stages; give at least one")
        taps = shaped(stages, input_shape, where="backbone", compute=True)
        parts = [stage for _, stage, _ in taps]
        plain = type(model) is nn.Sequential
        if isinstance(model, nn.Module) and not plain and not same_function(model, parts, input_shape):
            raise ConfigError(
                f"backbone: {type(model).__name__} does more than run its children in order; "
                f"give (name, module) pairs that do"
            )
        if len(taps[-1][2]) != 1:
            taps.append(("flat", nn.Flatten(), (prod(taps[-1][2]),)))
        return cls(taps, input_shape=input_shape)

    @property
    def features(self) -> int:
        """Width of the last tap."""
        return self.tap_shapes[self.names[-1]][0]

    def tap(self, name: str) -> int:
        """Index of the stage ``name``; raises :class:`UnknownNameError` with the nearest name."""
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownNameError(unknown_name("tap", name, self.names)) from None

    def forward(self, x: Tensor) -> Tensor:
        """features_BF, the last tap."""
        for stage in self.stages:
            x = stage(x)
        return x


def _opened(model: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(), which gives a layer that stands in two places only once.
    for name, child in model._modules.items():
        if child is None:
            continue
        if depth > 1 and isinstance(child, nn.Sequential) and len(child):
            yield from ((f"{name}.{inner}", part) for inner, part in _opened(child, depth - 1))
        else:
            yield name, child


def he_initialized(backbone: Backbone, *, fan: Literal["fan_in", "fan_out"]) -> Backbone:
    """The same backbone with weights redrawn from N(0, 2 / fan) and biases zero (He et al., 2015).

    Torch's defaults shrink the signal by a factor of about 2.4 at every layer of ReLUs; nets without
    normalization then learn next to nothing in their first epoch of small data.
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


def require_image(input_shape: tuple[int, ...], minimum: int, *, where: str) -> tuple[int, int, int]:
    """The input shape as (channels, height, width); both sides must have ``minimum`` pixels.

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
