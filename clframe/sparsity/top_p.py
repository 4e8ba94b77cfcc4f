"""Top-p masks on a GPU by a kernel that does not sort, compared with sorting at its first call.

Shape suffixes: T tokens, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from clframe.nn.kernels import device_of, is_traced, kernel_agrees, power_of_2, triton_installed

TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
WIDEST: Final = 16384
"""Most neurons of a token, which one program holds."""
TOKENS: Final = 256
"""Tokens that are compared."""
DIFFERING: Final = 1e-3
"""Largest share of entries in which both may differ: sums in another order may decide otherwise about equal ones."""


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

    def sample() -> Tensor:
        return x_TN.detach().reshape(-1, x_TN.shape[-1])[:TOKENS]

    def find_fault(found_TN: Tensor) -> str:
        differing = float((found_TN != plain(sample(), value)).double().mean())
        return "" if differing <= DIFFERING else f"differs from sorting in {differing:.2g} of the entries"

    agrees = kernel_agrees(
        "sparsity: the kernel top_p", (x_TN.shape[-1], x_TN.dtype, x_TN.device), x_TN,
        run=lambda: launch(sample(), value), find_fault=find_fault,
        fallback="activations are sorted, which takes longer", recording=False,
    )  # fmt: skip
    return launch(x_TN, value) if agrees else None


def _applies(x_TN: Tensor) -> bool:
    if not x_TN.is_cuda or x_TN.dtype not in TYPES or not 0 < x_TN.shape[-1] <= WIDEST or not x_TN.numel():
        return False
    return not is_traced(x_TN) and triton_installed()


def launch(x_TN: Tensor, value: float) -> Tensor:
    """Run the kernel: keep_TN, boolean."""
    from clframe.sparsity.triton_top_p import top_p

    x_TN = x_TN.detach().contiguous()
    neurons = x_TN.shape[-1]
    keep_TN = torch.empty(x_TN.shape, dtype=torch.bool, device=x_TN.device)
    share = torch.full((1,), value, dtype=torch.float64, device=x_TN.device)  # an argument would be in float32
    width = power_of_2(neurons)
    run: Any = top_p[(x_TN.numel() // neurons,)]
    with device_of(x_TN):
        run(x_TN, share, keep_TN.view(torch.int8), neurons, WIDTH=width, num_warps=min(16, max(1, width // 512)))
    return keep_TN
