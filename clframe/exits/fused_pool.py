"""Pooling of exits in one kernel on a GPU, compared with PyTorch's operations at its first call.

Shape suffixes: B batch, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from clframe.exits.layers import Blend, MaxAveragePool
from clframe.exits.row_buffers import is_channels_last
from clframe.nn.kernels import device_of, is_traced, kernel_agrees, relative_error, triton_installed

TOLERANCE: Final = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Types of the kernel, and the largest difference as a share of the largest value."""
PLACES, CHANNELS = 32, 64


class BlendedPool(nn.Sequential):
    """Pooling of 2x2 windows, the blend of maximum and average, flattened.

    Without gradients, maps in channels-last format on a GPU are read once, by one kernel; PyTorch's operations read
    them twice, write indices of the maximum that nothing uses, and copy the result to flatten it.

    >>> tuple(BlendedPool(MaxAveragePool(), Blend(), nn.Flatten())(torch.zeros(2, 3, 7, 4)).shape)
    (2, 18)
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        pool = self[0]  # ``fuse_batch_norm`` replaces it later by one of equal results
        self._windows = isinstance(pool, MaxAveragePool) and pool.size is None and pool.window == 2

    def forward(self, x: Tensor) -> Tensor:
        """features_BF of x_BCHW."""
        blend = self[1]
        assert isinstance(blend, Blend)
        if self._windows and _applies(x) and self._agrees(x, blend.a):
            return launch(x, blend.a)
        return self._plain(x)

    def _plain(self, x: Tensor) -> Tensor:
        features_BF: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return features_BF

    def _agrees(self, x: Tensor, a: Tensor) -> bool:
        """Whether the kernel agrees with PyTorch's operations for maps of this shape."""

        def find_fault(found_BF: Tensor) -> str:
            with torch.no_grad():
                plain_BF = self._plain(x[:1])
                difference = relative_error(found_BF.float().nan_to_num(), plain_BF.float().nan_to_num())
            return "" if difference <= TOLERANCE[x.dtype] else f"differs by {difference:.2g} of the largest value"

        return kernel_agrees(
            "exits: the pooling kernel", (x.dtype, x.device, x.shape[1:]), x, run=lambda: launch(x[:1], a),
            find_fault=find_fault, fallback="plain operations are used", recording=False,
        )  # fmt: skip


def _applies(x: Tensor) -> bool:
    if not x.is_cuda or torch.is_grad_enabled() or x.dtype not in TOLERANCE or not is_channels_last(x):
        return False
    return type(x) is Tensor and not is_traced(x) and min(x.shape[2:]) >= 2 and bool(x.numel()) and triton_installed()


def launch(x: Tensor, a: Tensor) -> Tensor:
    """Run the kernel: features_BF of x_BCHW."""
    from clframe.exits.triton_pool import blend_windows

    batch, channels, height, width = x.shape
    places = (height // 2) * (width // 2)
    features_BF = x.new_empty(batch, channels * places)
    grid = (batch, -(-places // PLACES), -(-channels // CHANNELS))
    run: Any = blend_windows[grid]
    with device_of(x):
        run(x, a, features_BF, channels, width // 2, places, *x.stride(), PLACES=PLACES, CHANNELS=CHANNELS, num_warps=4)
    return features_BF
