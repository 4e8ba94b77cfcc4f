"""Devices by name."""

from __future__ import annotations

import torch

from clframe.errors import UnsupportedError


def usable_device(name: str | torch.device, *, where: str = "--device") -> torch.device:
    """Device by name: cpu, cuda, cuda:N, mps, or auto for the best available.

    Args:
        name: The name, or a device of torch.
        where: Start of the error.

    Raises:
        UnsupportedError: The device is not available, or none of this name exists.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    advice = "give cpu, cuda, cuda:N or mps"
    if not isinstance(name, (str, torch.device)):
        raise UnsupportedError(f"{where}: found {name!r}; {advice}")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(f"{where}: found {name}, but {reason}; {advice}") from None
    if device.type == "meta":
        raise UnsupportedError(f"{where}: found meta, which has no values; use cpu, cuda, cuda:N or mps")
    return device
