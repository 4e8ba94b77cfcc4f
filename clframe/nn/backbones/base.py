"""What every backbone is: an ordered list of named stages whose outputs are taps of declared shape.

Nothing is hooked: whoever wants a tap runs the stages in order and keeps the output it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name

Flow = Tensor | tuple[Tensor, ...]
"""What goes from stage to stage: the tap, alone or followed by what travels with it (an attention mask)."""


def tap_of(value: Flow) -> Tensor:
    """The tap in what a stage returns."""
    return value if isinstance(value, Tensor) else value[0]


class Backbone(nn.Module):
    """Named stages run one after the other; the last one ends in a flat feature vector.

    Args:
        stages: ``(name, module, tap shape)`` in order. The shape is that of one sample's output, computed
            by arithmetic from the constructor's arguments. A later stage must not write into its input.
        input_shape: Shape of one sample, (channels, height, width).

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
