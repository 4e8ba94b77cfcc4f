"""Products of few rows and a large matrix on a CPU, in as many parts as there are threads.

torch computes such a product with one thread, or gains little from more; parts of it run side by side.

Shape suffixes: N rows, I inputs, O outputs, p parts, o outputs of a part; E experts, H neurons and D inputs of each.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.nn.kernels import is_traced

LARGE: Final = 2_000_000
"""Number of weights of a matrix from which parts are used: 768-3072-768 was measured."""
FEW_ROWS: Final = 400
"""Number of rows, of all parts together, up to which they are faster; their results are added."""


def parts_of(x_ND: Tensor, up_EHD: Tensor) -> int:
    """Number of parts in which products with the neurons of all experts are computed: threads if several, else 1.

    Not while gradients are enabled, nor while a function is traced, which would fix the number of threads.
    """
    if is_traced(x_ND) or torch.is_grad_enabled() or not x_ND.is_cpu:  # first: traced numbers of rows stay free
        return 1
    threads, neurons = torch.get_num_threads(), up_EHD.shape[:2].numel()
    if neurons % threads or up_EHD.numel() < LARGE or not 0 < threads * len(x_ND) <= FEW_ROWS:
        return 1
    return threads if x_ND.dtype in (torch.float32, torch.float64) else 1


def split_outputs(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, parts: int) -> Tensor:
    """``F.linear``, its outputs in so many parts.

    >>> x_NI, weight_OI = torch.tensor([[1.0, 2.0]]), torch.arange(12.0).view(6, 2)
    >>> torch.equal(split_outputs(x_NI, weight_OI, None, parts=3), x_NI @ weight_OI.T)
    True
    """
    if parts == 1:
        return F.linear(x_NI, weight_OI, bias_O)
    rows, inputs = x_NI.shape
    x_pNI = x_NI.expand(parts, rows, inputs)
    weight_pIo = weight_OI.unflatten(0, (parts, -1)).transpose(1, 2)
    if bias_O is None:
        y_pNo = torch.bmm(x_pNI, weight_pIo)
    else:
        y_pNo = torch.baddbmm(bias_O.view(parts, 1, -1), x_pNI, weight_pIo)
    return y_pNo.transpose(0, 1).reshape(rows, -1)


def split_inputs(x_NI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, *, parts: int) -> Tensor:
    """``x W`` plus the bias, its inputs in so many parts.

    >>> x_NI, weight_IO = torch.ones(2, 6), torch.arange(12.0).view(6, 2)
    >>> torch.equal(split_inputs(x_NI, weight_IO, torch.ones(2), parts=2), x_NI @ weight_IO + 1)
    True
    """
    if parts == 1:
        return x_NI @ weight_IO if bias_O is None else torch.addmm(bias_O, x_NI, weight_IO)
    y_NO = torch.bmm(x_NI.unflatten(1, (parts, -1)).transpose(0, 1), weight_IO.unflatten(0, (parts, -1))).sum(0)
    return y_NO if bias_O is None else y_NO.add_(bias_O)
