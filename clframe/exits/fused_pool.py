"""Pooling of exits in one kernel on a GPU, compared with PyTorch's operations at its first call.

Shape suffixes: B batch, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from clframe.errors import reason_of
from clframe.exits.layers import Blend, MaxAveragePool
from clframe.exits.row_buffers import is_channels_last
from clframe.sparsity.top_p import triton_installed

_log = logging.getLogger(__name__)

TOLERANCE: Final = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Types of the kernel, and the largest difference as a share of the largest value."""
PLACES, CHANNELS = 32, 64
_agrees: dict[tuple[object, ...], bool] = {}


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
        key = (x.dtype, x.device, x.shape[1:])
        if key not in _agrees:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            failure = self._compare(x[:1], a)
            _agrees[key] = not failure
            if failure:
                _log.warning(
                    "exits: the pooling kernel %s on %s; plain operations are used; please report this with the "
                    "versions of torch and triton", failure, x.device,
                )  # fmt: skip
        return _agrees[key]

    @torch.no_grad()
    def _compare(self, x: Tensor, a: Tensor) -> str:
        """Description of how the kernel fails on a map; empty if it agrees."""
        try:
            found_BF = launch(x, a)
        except Exception as error:  # Triton compiles here: its own errors, and those of a missing compiler or driver
            return f"does not run ({reason_of(error, most=160)})"
        found_BF, plain_BF = found_BF.float().nan_to_num(), self._plain(x).float().nan_to_num()
        difference = float((found_BF - plain_BF).abs().max())
        agrees = difference <= TOLERANCE[x.dtype] * float(plain_BF.abs().max())
        return "" if agrees else f"differs by {difference:.2g}"


def _applies(x: Tensor) -> bool:
    if not x.is_cuda or torch.is_grad_enabled() or x.dtype not in TOLERANCE or not is_channels_last(x):
        return False
    traced = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x) or type(x) is not Tensor
    return not traced and min(x.shape[2:]) >= 2 and bool(x.numel()) and triton_installed()


def launch(x: Tensor, a: Tensor) -> Tensor:
    """Run the kernel: features_BF of x_BCHW."""
    from clframe.exits.triton_pool import blend_windows

    batch, channels, height, width = x.shape
    places = (height // 2) * (width // 2)
    features_BF = x.new_empty(batch, channels * places)
    grid = (batch, -(-places // PLACES), -(-channels // CHANNELS))
    run: Any = blend_windows[grid]
    with torch.cuda.device_of(x):
        run(x, a, features_BF, channels, width // 2, places, *x.stride(), PLACES=PLACES, CHANNELS=CHANNELS, num_warps=4)
    return features_BF
