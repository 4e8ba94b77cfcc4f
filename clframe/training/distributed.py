"""One model trained by several processes, one per device: how they share a batch and stay identical.

Every process draws the same batch: order, augmentation, replayed samples and heads are functions of (seed, experience,
epoch, step), and all of them have all data. A process runs the network on its share of the rows, every n-th one, and
gathers the outputs of all. So each computes the losses of the whole batch, whatever they are: means over parts of it,
contrastive terms, penalties on weights. With n processes and the loss L of the whole batch::

    rows r, r + n, r + 2n, ... of every part of the batch     the share of process r
    gradient of the gathered outputs -> n * own rows          each process runs backward on the same L
    mean over processes of the gradients of the weights       = dL/dw, as in one process

A term on weights has the whole gradient in each process, and the mean leaves it as it is. Buffers, importances and
metrics are computed from whole batches and whole data by every process.

What is not as in one process: batch normalization uses the statistics of a share (unless ``trainer.sync_batchnorm``),
whose running means and variances are averaged after each update, and dropout draws other masks. A batch with fewer than
two rows per process, or with parts that cannot be divided evenly, is computed by every process as a whole.

Shape suffixes: N rows of a batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from clframe.errors import DistributedError
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.shares import Share, divide
from clframe.training.synchronization import as_bytes, buckets, synchronize


class _Gather(torch.autograd.Function):
    """Rows of the whole batch from the shares; backward, n times the gradient of the own rows of n processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: Share, group: Group) -> Tensor:
        ctx.share, ctx.group = share, group
        return group.gather(own, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Autograd runs what was computed last first: the losses are done, and the own rows of the network follow.
        ctx.group.on_own_rows()
        return gradients[0].index_select(0, ctx.share.rows) * ctx.group.size, None, None


class _Mean(torch.autograd.Function):
    """Mean of means over the rows of each share; backward, n times the gradient of the own summand of n processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: Share, group: Group) -> Tensor:
        ctx.factor = share.count / share.size
        ctx.world = group.size
        return group.sum(own * ctx.factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * (ctx.factor * ctx.world), None, None


class Group:
    """The processes that train one model; torch.distributed is initialized.

    Args:
        rank: Number of this process, from 0.
        devices: Those of all processes.

    Attributes:
        on_own_rows: Called when the backward pass reaches the rows of this process.
    """

    def __init__(self, rank: int, devices: Sequence[torch.device]) -> None:
        self.on_own_rows: Callable[[], None] = lambda: None
        self.rank, self.size, self.devices = rank, len(devices), tuple(devices)
        self.device = self.devices[rank]
        self._shares: dict[tuple[int, tuple[int, ...], int], Share | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Return the group itself."""
        return self

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    # --- a batch ----------------------------------------------------------------------------------

    def share(self, size: int, parts: Sequence[int] = (), *, least: int = 1) -> Share | None:
        """Return the share of a batch on the device; None where every process computes the whole batch.

        Args:
            size: Rows of the batch.
            parts: Sizes of the parts that have separate batch statistics.
            least: Fewest rows of each part for every process.
        """
        key = size, tuple(parts), least
        if key not in self._shares:
            sizes = key[1] or (size,)
            whole = min(sizes) < least * self.size or (len(sizes) > 1 and any(part % self.size for part in sizes))
            share = None
            if not whole:
                share = divide(size, key[1], rank=self.rank, world=self.size).on(self.device)
            self._shares[key] = share
        return self._shares[key]

    def gather_output(self, own: Output, share: Share, *, stages: Collection[str]) -> Output:
        """Return the output for the whole batch from the outputs of all shares.

        Args:
            own: Output for the own rows.
            share: The share.
            stages: Taps with one row per sample; others are means over the rows.
        """
        widths = [logits_BC.shape[1] for logits_BC in own.logits]
        if not any(widths):
            logits = tuple(logits_BC.new_zeros(share.size, 0) for logits_BC in own.logits)
        else:
            logits = self._gather(torch.cat(own.logits, dim=1), share).split(widths, dim=1)
        taps = {
            name: self._gather(tap, share) if name in stages else _Mean.apply(tap, share, self)
            for name, tap in own.taps.items()
        }
        return own._replace(logits=tuple(logits), taps=taps)

    def _gather(self, own: Tensor, share: Share) -> Tensor:
        found: Tensor = _Gather.apply(own, share, self)
        return found

    def gather(self, own: Tensor, share: Share) -> Tensor:
        """Return the rows of the whole batch from those of every share, without a gradient."""
        if share.count < share.most:
            own = torch.cat([own, own.new_zeros(share.most - share.count, *own.shape[1:])])
        found = own.new_empty(self.size * share.most, *own.shape[1:])
        dist.all_gather_into_tensor(as_bytes(found), as_bytes(own.contiguous()))
        return found.index_select(0, share.order)

    # --- statistics -------------------------------------------------------------------------------

    @torch.no_grad()
    def average_statistics(self, norms: Sequence[nn.Module], share: Share | None) -> None:
        """Average the running statistics of batch normalization over the processes.

        Args:
            norms: Modules whose running means and variances are averaged, weighted by the rows of each process.
            share: Of the batch; None where every process computed all of it.
        """
        weight = 1.0 if share is None else share.count * self.size / share.size
        statistics = [value for norm in norms for value in _statistics(norm)]
        if statistics and weight != 1:
            torch._foreach_mul_(statistics, weight)
        for bucket in buckets(statistics):
            flat = torch.cat([value.reshape(-1).float() for value in bucket])
            dist.all_reduce(flat)
            flat.div_(self.size)
            torch._foreach_copy_(bucket, list(flat.split([value.numel() for value in bucket])))

    # --- numbers ----------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def total(self, number: int) -> int:
        """Return the sum of a number over the processes."""
        return int(self.sum(torch.tensor(number, dtype=torch.int64, device=self.device)))

    def agree(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of the first process, so that every process decides alike."""
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        dist.broadcast(values, 0)
        return dict(zip(metrics, values.tolist(), strict=True))

    def check_equal(self, values: Mapping[str, Tensor | float], *, where: str, advice: str) -> None:
        """Check that numbers are equal in all processes.

        Args:
            values: By name.
            where: Place in the run, for the message.
            advice: What to do, for the message.

        Raises:
            DistributedError: They differ, so that the processes no longer train the same model.
        """
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()])
        own = own.nan_to_num(nan=math.pi)
        found = own.new_empty(self.size * len(own))
        dist.all_gather_into_tensor(found, own)
        different = (found.view(self.size, -1) != own).any(0).tolist()
        names = [name for name, differs in zip(values, different, strict=True) if differs]
        if names:
            raise DistributedError(f"trainer.devices: the processes differ {where} ({', '.join(names)}); {advice}")

    # --- state ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run a block in the first process, then in the others."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def barrier(self) -> None:
        """Return once every process is here."""
        dist.all_reduce(torch.zeros(1, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def synchronize(self, network: Network, states: Mapping[str, Any]) -> dict[str, Any]:
        """Give every process the weights, buffers and component states of the first one; returns the states.

        On a GPU, sums may differ in their last bits between processes, and with them selected samples and thresholds.

        Args:
            network: Its tensors are overwritten.
            states: States by component name.
        """
        found = synchronize(network, states, device=self.device, is_first=self.is_first)
        self.synchronize_generator()
        return found

    def synchronize_generator(self) -> None:
        """Give the generator of every GPU the state of the first one's; those of the CPU are equal already."""
        if self.device.type == "cuda":
            state = torch.cuda.get_rng_state(self.device)
            dist.broadcast(state, 0)
            torch.cuda.set_rng_state(state, self.device)

    def close(self) -> None:
        """Leave the group; the last call of a process."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _statistics(norm: nn.Module) -> list[Tensor]:
    values = [getattr(norm, "running_mean", None), getattr(norm, "running_var", None)]
    return [value for value in values if value is not None]


def learning_norms(network: nn.Module) -> list[nn.Module]:
    """Return the batch normalizations that update running statistics of the rows that this process computes."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [
        part for part in network.modules()
        if isinstance(part, kinds) and part.training and not isinstance(part, nn.SyncBatchNorm)
    ]  # fmt: skip
