"""Launches of Triton kernels, and the comparison of a kernel with PyTorch's operations before its results are used.

A kernel that this version of Triton, driver or device compiles wrongly would change results without an error. So the
first call of every kind in a process is compared.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from clframe.errors import reason_of

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_agrees: dict[tuple[object, ...], bool] = {}


def kernel_agrees(
    kernel: str,
    kind: tuple[object, ...],
    x: Tensor,
    *,
    run: Callable[[], Result],
    find_fault: Callable[[Result], str],
    fallback: str,
    recording: bool = True,
) -> bool:
    """Whether a kernel computes what plain operations do; a warning is logged once if not.

    Compares at the first call of a kind in this process, which waits for the device.

    Args:
        kernel: Start of the warning: ``experts: the kernel route``.
        kind: Shapes, types, device and settings for which the kernel is compiled.
        x: A tensor of the call.
        run: Runs the kernel on a sample of the call.
        find_fault: Describes how the results of ``run`` differ from plain operations; empty if they agree.
        fallback: End of the warning: ``plain operations are used``.
        recording: Answer without comparison while a CUDA graph is recorded, where nothing can wait for the device.

    Raises:
        OutOfMemoryError: Memory did not suffice, from which nothing follows about the kernel.
    """
    key = kernel, *kind
    if key not in _agrees:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return recording
        with _disable_current_modes():  # a mode that counts MACs must not see this
            fault = _compare(run, find_fault)
        _agrees[key] = not fault
        if fault:
            _log.warning(
                "%s %s on %s; %s; please report this with the versions of torch and triton",
                kernel, fault, x.device, fallback,
            )  # fmt: skip
    return _agrees[key]


def _compare(run: Callable[[], Result], find_fault: Callable[[Result], str]) -> str:
    try:
        found = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton compiles here: its own errors, and those of a missing compiler or driver
        return f"does not run ({reason_of(error, most=160)})"
    return find_fault(found)


def relative_error(own: Tensor, plain: Tensor) -> float:
    """Largest difference as a share of the largest value; infinite for NaN.

    >>> relative_error(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0]))
    0.2...
    """
    own, plain = own.float(), plain.float()
    error = float((own - plain).abs().max() / plain.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    return math.inf if math.isnan(error) else error


@cache
def triton_installed() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_traced(x: Tensor) -> bool:
    """Whether a function of ``x`` is being compiled or transformed, in which no kernel can be launched or compared."""
    return is_compiling() or is_functorch_wrapped_tensor(x)


def is_compiling() -> bool:
    """Whether the compiler traces this call, or would trace the launch of a kernel in it.

    The second is the case in a function that the compiler left to Python, after an operation that it does not know or
    too many variants: it then tries to compile every function that is called from there.
    """
    return torch.compiler.is_compiling() or get_eval_frame_callback() not in (None, False)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which kernels are launched on the device of ``x``."""
    return torch.cuda.device_of(x)


def power_of_2(value: int, *, least: int = 16) -> int:
    """Smallest power of 2 of at least ``value`` and ``least``.

    >>> power_of_2(24), power_of_2(3)
    (32, 16)
    """
    return max(least, 1 << (value - 1).bit_length())
