"""Packages that only some backbones need, imported when one of those is built."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clframe.errors import ConfigError, DataError, UnknownNameError, UnsupportedError, unknown_name


def needed(package: str, *, where: str) -> Any:
    """The module ``package``, which the extra of the same name installs.

    Raises:
        UnsupportedError: It is not installed, or something that it needs itself is missing.

    >>> needed("no_such_package", where="mine")
    Traceback (most recent call last):
    clframe.errors.UnsupportedError: mine: found no package no_such_package; pip install clframe[no_such_package]
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        found = f"no package {package}" if error.name == package else f"a broken {package} ({error})"
        raise UnsupportedError(f"{where}: found {found}; pip install clframe[{package}]") from error


def torchvision_model(name: str, *, weights: str | None, channels: int) -> Any:
    """The torchvision model ``name``, classifier and all, randomly initialized or with published weights.

    Random weights are drawn as torchvision does: the same seed gives the same model as calling it directly.

    Args:
        name: Name of its builder, such as ``resnet18``; messages name it too.
        weights: Name of an entry of the model's weights enumeration, such as ``IMAGENET1K_V1``, downloaded
            once through torchvision; None for random weights.
        channels: Channels of the images; published weights need 3.

    Raises:
        UnknownNameError: Weights that torchvision does not have for this model.
        ConfigError: Weights for other than three channels.
        DataError: Weights that could not be downloaded.
    """
    from torchvision.models import get_model

    model = get_model(name)
    if weights is not None:
        model.load_state_dict(published_state(name, weights, channels=channels)[0])
    return model


def published_state(name: str, weights: str, *, channels: int) -> tuple[dict[str, Tensor], int]:
    """The published weights of a torchvision model, and the smallest side of image they are for.

    The file's hash is checked, and it is read as tensors only.

    Raises:
        UnknownNameError: Weights that torchvision does not have for this model.
        ConfigError: Other than three channels.
        DataError: Weights that could not be downloaded.
    """
    from torchvision.models import get_model_weights

    known = get_model_weights(name).__members__
    if weights not in known:
        raise UnknownNameError(unknown_name("weights", weights, known, where=f"{name}.weights"))
    if channels != 3:
        raise ConfigError(f"{name}.weights: found images of {channels} channels; use 3, or leave weights out")
    entry = known[weights]
    try:
        state = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no connection, or what arrived has another hash
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}.weights: {entry.url} could not be loaded ({reason}); "
            f"connect and try again, or leave weights out"
        ) from error
    return state, min(entry.meta["min_size"])


def for_channels(convolution: nn.Conv2d, channels: int, *, draw: Callable[[Tensor], object]) -> nn.Conv2d:
    """The first convolution of a model for images of ``channels`` channels.

    Args:
        convolution: As the model has it; returned itself where it takes ``channels`` already.
        channels: Channels of the images.
        draw: Fills the new weights in place, as the model's own initialization does; the bias is zero.
    """
    if convolution.in_channels == channels:
        return convolution
    size: Any = convolution.kernel_size
    stride: Any = convolution.stride
    padding: Any = convolution.padding
    bias = convolution.bias is not None
    fitted = nn.Conv2d(channels, convolution.out_channels, size, stride=stride, padding=padding, bias=bias)
    draw(fitted.weight)
    if fitted.bias is not None:
        nn.init.zeros_(fitted.bias)
    return fitted


class ChannelsFirst(nn.Module):
    """A module that works on channels-last maps, made to take and return (B, channels, height, width).

    Both permutations are views: nothing is copied.

    Args:
        body: Module on (B, height, width, channels).
        from_image: The module itself takes channels first, and only its output is turned.
    """

    def __init__(self, body: nn.Module, *, from_image: bool = False) -> None:
        super().__init__()
        self.body = body
        self.from_image = from_image

    def forward(self, x: Tensor) -> Tensor:
        """maps_BCHW to maps_BCHW, or whatever else the module ends in."""
        out: Tensor = self.body(x if self.from_image else x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2) if out.ndim == 4 else out
