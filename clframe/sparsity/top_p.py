"""Top-p masks on a GPU by a kernel that does not sort, compared with sorting at its first call.

Shape suffixes: T tokens, N neurons.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from clframe.errors import reason_of

_log = logging.getLogger(__name__)

TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
WIDEST: Final = 16384
"""Most neurons of a token, which one program holds."""
TOKENS: Final = 256
"""Tokens that are compared."""
DIFFERING: Final = 1e-3
"""Largest share of entries in which both may differ: sums in another order may decide otherwise about equal ones."""

_agrees: dict[tuple[object, ...], bool] = {}


def kernel_top_p(x_TN: Tensor, value: float, *, plain: Callable[[Tensor, float], Tensor]) -> Tensor | None:
    """keep_TN of the rule top-p on a CUDA device; None where the kernel does not apply or has given another mask.

    Waits for the device at the first call for a number of neurons, type and device.

    Args:
        x_TN: Activations, with at least one neuron.
        value: The share p.
        plain: Computes the same mask by sorting.
    """
    if not _applies(x_TN):
        return None
    key = x_TN.shape[-1], x_TN.dtype, x_TN.device
    if key not in _agrees:
        if torch.cuda.is_current_stream_capturing():
            return None
        sample_TN = x_TN.detach().reshape(-1, x_TN.shape[-1])[:TOKENS]
        fault = _find_fault(sample_TN, value, plain)
        _agrees[key] = not fault
        if fault:
            _log.warning(
                "sparsity: the kernel top_p %s on %s; activations are sorted, which takes longer; please report this "
                "with the versions of torch and triton", fault, x_TN.device,
            )  # fmt: skip
    return launch(x_TN, value) if _agrees[key] else None


def _find_fault(x_TN: Tensor, value: float, plain: Callable[[Tensor, float], Tensor]) -> str:
    """Description of how the kernel fails on these tokens; empty if it agrees."""
    try:
        found_TN = launch(x_TN, value)
    except Exception as error:  # Triton compiles here: its own errors, and those of a missing compiler or driver
        return f"does not run ({reason_of(error, most=160)})"
    differing = float((found_TN != plain(x_TN, value)).double().mean())
    return "" if differing <= DIFFERING else f"differs from sorting in {differing:.2g} of the entries"


def _applies(x_TN: Tensor) -> bool:
    if not x_TN.is_cuda or x_TN.dtype not in TYPES or not 0 < x_TN.shape[-1] <= WIDEST or not x_TN.numel():
        return False
    return not torch.compiler.is_compiling() and triton_installed()


def launch(x_TN: Tensor, value: float) -> Tensor:
    """Run the kernel: keep_TN, boolean."""
    from clframe.sparsity.triton_top_p import top_p

    x_TN = x_TN.detach().contiguous()
    neurons = x_TN.shape[-1]
    keep_TN = torch.empty(x_TN.shape, dtype=torch.bool, device=x_TN.device)
    share = torch.full((1,), value, dtype=torch.float64, device=x_TN.device)  # an argument would be in float32
    width = max(16, 1 << (neurons - 1).bit_length())
    run: Any = top_p[(x_TN.numel() // neurons,)]
    run(x_TN, share, keep_TN.view(torch.int8), neurons, WIDTH=width, num_warps=min(16, max(1, width // 512)))
    return keep_TN


@cache
def triton_installed() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
