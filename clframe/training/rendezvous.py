"""Rendezvous of the processes that train one model: the store through which they find each other, and the group."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from clframe.errors import DistributedError
from clframe.training.distributed import Group

TIMEOUT = timedelta(minutes=30)
"""Longest time for which a process waits for the others; one that has died is noticed within seconds."""


def open_store(port: int, *, size: int, first: bool) -> Any:
    """Return the store through which the processes of this machine find each other; port 0 chooses one."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # torch declares it for builds with collectives only
        "127.0.0.1", port, size, is_master=first, timeout=TIMEOUT, wait_for_workers=False)


def join_group(store: Any, *, rank: int, devices: Sequence[torch.device]) -> Group:
    """Initialize torch.distributed and return the group, once all processes have joined.

    Args:
        store: See :func:`open_store`.
        rank: Number of this process.
        devices: Devices of all processes, which communicate by NCCL on CUDA and by gloo on CPUs.

    Raises:
        DistributedError: torch.distributed is in use already.
    """
    if dist.is_initialized():
        raise DistributedError(
            "trainer.devices: torch.distributed is in use in this process already; start clframe once, it starts a "
            "process for each device"
        )
    group = Group(rank, devices)
    cuda = group.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(group.device)
    hook = sys.excepthook
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=group.size, timeout=TIMEOUT
    )
    sys.excepthook = hook  # torch's own puts the rank before every line of a traceback
    return group
