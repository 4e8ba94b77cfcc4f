"""The check for models that cannot be trained with their channels last in memory."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from clframe.errors import UnsupportedError

NARROWEST: Final = 8
"""Fewest input channels of a strided 1x1 convolution that oneDNN trains with channels last."""


def require_channels_last(model: nn.Module, device: torch.device) -> None:
    """Refuse a model that cannot be trained with channels last on a CPU.

    oneDNN 3 (torch 2.15) writes outside its buffers in the weight gradient of a strided 1x1 convolution with fewer
    than 8 input channels on CPUs with AVX2, which ends the process. The check can go when that is fixed.

    Raises:
        UnsupportedError: The model has such a convolution.
    """
    if device.type != "cpu":
        return
    for name, part in model.named_modules():
        strided = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and max(part.stride) > 1
        if strided and part.in_channels < NARROWEST:
            raise UnsupportedError(
                f"trainer.channels_last: found the strided 1x1 convolution '{name}' with {part.in_channels} input "
                f"channels, which crashes on a CPU; set trainer.channels_last=false or a larger backbone.width"
            )
