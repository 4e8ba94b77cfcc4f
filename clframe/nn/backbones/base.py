"""What every backbone is: an ordered list of named stages whose outputs are taps of declared shape.

Nothing is hooked: whoever wants a tap runs the stages in order and keeps the output it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Literal

from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.nn.backbones.taps import Flow as Flow
from clframe.nn.backbones.taps import same_function, shaped
from clframe.nn.backbones.taps import tap_of as tap_of


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
        :func:`~clframe.nn.backbones.taps.shaped`); where the last tap is not flat, a stage ``flat`` follows.

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
