"""Optional packages and published weights, loaded when a backbone that needs them is built."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from clframe.errors import ConfigError, DataError, UnknownNameError, UnsupportedError, unknown_name
from clframe.nn.backbones.base import Backbone


def require_package(package: str, *, where: str) -> Any:
    """Import ``package``, which the extra of the same name installs.

    Raises:
        UnsupportedError: The package or one of its dependencies is missing.

    >>> require_package("no_such_package", where="mine")
    Traceback (most recent call last):
    clframe.errors.UnsupportedError: mine: found no package no_such_package; pip install clframe[no_such_package]
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        found = f"no package {package}" if error.name == package else f"a broken {package} ({error})"
        raise UnsupportedError(f"{where}: found {found}; pip install clframe[{package}]") from error


def torchvision_model(name: str, *, weights: str | None, channels: int) -> Any:
    """Build the torchvision model ``name`` including its classifier, with random or published weights.

    Random weights are drawn by torchvision: the same seed gives the same model as calling torchvision.

    Args:
        name: Name of its builder, such as ``resnet18``; also used in messages.
        weights: Name of an entry of the model's weights enumeration, such as ``IMAGENET1K_V1``, downloaded
            once through torchvision; None is random.
        channels: Channels of the images; published weights need 3.

    Raises:
        UnknownNameError: Weights that torchvision does not have for this model.
        ConfigError: Weights for other than three channels.
        DataError: Weights that could not be downloaded.
    """
    from torchvision.models import get_model

    model = get_model(name)
    if weights is not None:
        model.load_state_dict(load_published_state(name, weights, channels=channels)[0])
    return model


def load_published_state(name: str, weights: str, *, channels: int) -> tuple[dict[str, Tensor], int]:
    """Load the published weights of a torchvision model; return them and their minimum image side.

    The hash of the file is checked, and it is read as tensors only.

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
    except (OSError, RuntimeError) as error:  # no connection, or the download has another hash
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}.weights: {entry.url} could not be loaded ({reason}); "
            f"connect and try again, or leave weights out"
        ) from error
    return state, min(entry.meta["min_size"])


def adapt_channels(convolution: nn.Conv2d, channels: int, *, draw: Callable[[Tensor], object]) -> nn.Conv2d:
    """Adapt the first convolution of a model to images of ``channels`` channels.

    Args:
        convolution: The first convolution; returned unchanged if it already takes ``channels``.
        channels: Channels of the images.
        draw: Initializes the new weights in place like the model does; the bias is zero.
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
    """Wraps a module on channels-last maps so that it takes and returns (B, channels, height, width).

    Both permutations are views: nothing is copied.

    Args:
        body: Module on (B, height, width, channels).
        from_image: Whether the module takes channels first, so that only its output is permuted.
    """

    def __init__(self, body: nn.Module, *, from_image: bool = False) -> None:
        super().__init__()
        self.body = body
        self.from_image = from_image

    def forward(self, x: Tensor) -> Tensor:
        """Permute maps_BCHW, run the module, and permute its output back if it is a map."""
        out: Tensor = self.body(x if self.from_image else x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2) if out.ndim == 4 else out


def with_channels_first(backbone: Backbone) -> Backbone:
    """A backbone whose taps are (channels, height, width), of one whose maps are (height, width, channels)."""
    stages: Sequence[Any] = [ChannelsFirst(stage, from_image=not i) for i, stage in enumerate(backbone.stages)]
    shapes = [backbone.tap_shapes[name] for name in backbone.names]
    turned = [(shape[2], shape[0], shape[1]) if len(shape) == 3 else shape for shape in shapes]
    return Backbone(list(zip(backbone.names, stages, turned, strict=True)), input_shape=backbone.input_shape)
