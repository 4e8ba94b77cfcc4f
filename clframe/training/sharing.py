"""Batches of a strategy that several processes share; see :mod:`clframe.training.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import UnsupportedError
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.seeding import derive_seed
from clframe.training.distributed import Group, learning_norms
from clframe.training.learner import Learner
from clframe.training.observer import UNOBSERVED
from clframe.training.reduction import GradientReduction
from clframe.training.shares import Share
from clframe.training.synchronization import fingerprint, state_tensors


class SharedBatches:
    """Mixin of a strategy: passes of the network of which each process computes a share.

    Attributes:
        group: The processes; None for one, in which nothing here acts.
    """

    # Declared for readers; LightningStrategy and Avalanche's template provide them.
    learner: Learner | None
    fabric: Any
    batch: Any
    clock: Any
    device: torch.device
    is_training: bool
    _epoch: int
    convert_input: Callable[[Any], Any]
    run_network: Callable[..., Output]

    group: Group | None = None
    _share: Share | None = None
    _batches: Tensor | float = 0.0
    _draws: bool | None = None
    _listed: Any = None
    _norms: Sequence[nn.Module] = ()
    _reduction: GradientReduction | None = None

    def share_batches(self, group: Group | None) -> None:
        """Share batches among the processes of a group."""
        self.group = group
        if group is not None:
            assert self.learner is not None, "several processes train the components of a ContinualModule"
            self.learner.shared_run = self._run_teacher
            learner = self.learner
            group.on_own_rows = lambda: learner.observer.begin_share()

    def run_shared(self, x: Tensor, *, parts: tuple[int, ...] = ()) -> Output:
        """Return the output of the network for a batch, of which this process computes its share.

        Args:
            x: Inputs of the whole batch.
            parts: Sizes of the parts with separate batch statistics.
        """
        assert self.learner is not None
        network, group = self.learner.network, self.group
        if group is None:
            return self.run_network(network, x, parts=parts)
        trains = network.training and torch.is_grad_enabled()
        # Two rows for each process: batch normalization of one value per channel is undefined.
        share = self._share = group.share(len(x), parts, least=2 if trains else 1)
        if share is None:
            return self.run_network(network, x, parts=parts)
        own_x = self.convert_input(x.index_select(0, share.rows))
        with self.sharing(), self._own_draws() if trains else nullcontext():
            own = self.run_network(network, own_x, parts=share.parts)
        return group.gather_output(own, share, stages=network.backbone.names)

    def _run_teacher(self, teacher: Network, x: Tensor, taps: Collection[str]) -> Output:
        """Return the output of a teacher for a batch, of which this process computes its share."""
        assert self.group is not None and self.learner is not None
        share = self.group.share(len(x))
        if share is None:
            output: Output = teacher(x, taps=taps)
            return output
        own_x = self.convert_input(x.index_select(0, share.rows))
        with self.learner.observer.sharing(rows=share.count, of=share.size):
            own = teacher(own_x, taps=taps)
        return self.group.gather_output(own, share, stages=teacher.backbone.names)

    def sharing(self) -> AbstractContextManager[object]:
        """Return the observer's context manager for what this process computes of the current batch."""
        share = self._share
        if self.group is None or share is None:
            return UNOBSERVED
        assert self.learner is not None
        return self.learner.observer.sharing(rows=share.count, of=share.size)

    def note_batch(self) -> None:
        """Add the current batch to what :meth:`check_replicas` compares, without waiting for the device."""
        if self.group is None:
            return
        assert self.learner is not None
        batch, weight = self.batch, 1 + self.learner.step_counts()[0] % 13
        self._batches += weight * (batch.y.mean(dtype=torch.float64) + batch.x[..., 0].mean(dtype=torch.float64))

    def begin_average(self) -> None:
        """Let the backward pass that follows average gradients over the processes as they become complete."""
        if self.group is not None:
            self._current_reduction().begin()

    def average_gradients(self) -> None:
        """Average gradients, and the running statistics of batch normalization, over the processes."""
        if self.group is None:
            return
        assert self.learner is not None
        position = (self.learner.experience, self._epoch)
        if position != self._listed:
            self._listed, self._norms = position, learning_norms(self.learner.network)
        self._current_reduction().finish()
        self.group.average_statistics(self._norms, self._share)

    def _current_reduction(self) -> GradientReduction:
        """Return what averages the gradients of the parameters that learn now."""
        assert self.group is not None and self.learner is not None
        learning = [parameter for parameter in self.learner.network.parameters() if parameter.requires_grad]
        if self._reduction is None or list(map(id, learning)) != list(map(id, self._reduction.parameters)):
            if self._reduction is not None:
                self._reduction.close()
            self._reduction = GradientReduction(learning, world=self.group.size)
        return self._reduction

    def synchronize(self) -> None:
        """Give every process the weights and states of the first one."""
        if self.group is not None:
            assert self.learner is not None
            self.learner.state = self.group.synchronize(self.learner.network, self.learner.state)
            self._batches, self._draws, self._listed = 0.0, None, None

    def check_replicas(self) -> None:
        """Check that all processes have trained on the same batches and have the same weights.

        Raises:
            DistributedError: They do not.
        """
        if self.group is None:
            return
        assert self.learner is not None and self.learner.experience is not None
        network = self.learner.network
        values: dict[str, Tensor | float] = {
            "batches": self._batches,
            "weights": fingerprint(network.parameters()),
            "buffers of the network": fingerprint(network.buffers()),
            "states of components": fingerprint(state_tensors(self.learner.state)),
        }
        where = f"after epoch {self._epoch + 1} of experience {self.learner.experience.index + 1}"
        advice = "a component that draws other random numbers than those of its context does that; train on one device"
        self.group.check_equal(values, where=where, advice=advice)

    def share_generator(self) -> None:
        """Give every process the random state of the first one's device."""
        if self.group is not None:
            self.group.synchronize_generator()

    def agree(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the first process, by which all decide."""
        return dict(metrics) if self.group is None else self.group.agree(metrics)

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Run the network with random numbers of this process, for dropout, and leave the common ones as they are."""
        generator = _Generators(self.device)
        if self._draws is None:  # the first pass of an experience shows whether there are draws
            before = generator.get()
            yield
            self._draws = generator.differ(before)
            generator.set(before)
            return
        if not self._draws:
            yield
            return
        assert self.learner is not None and self.learner.experience is not None and self.group is not None
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError("dropout draws other numbers in each process")
        before = generator.get()
        position = self.learner.experience.index, self._epoch, int(self.clock.train_epoch_iterations)
        seed = derive_seed(self.learner.seed or 0, "dropout", *position, self.group.rank)
        generator.seed(seed)
        try:
            yield
        finally:
            generator.set(before)


class _Generators:
    """torch's global generators of the CPU and of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def get(self) -> list[Tensor]:
        """Return their states."""
        states = [torch.default_generator.get_state()]
        return states if self._device is None else [*states, torch.cuda.get_rng_state(self._device)]

    def set(self, states: list[Tensor]) -> None:
        """Restore :meth:`get`."""
        torch.default_generator.set_state(states[0])
        if self._device is not None:
            torch.cuda.set_rng_state(states[1], self._device)

    def seed(self, seed: int) -> None:
        """Seed them."""
        torch.default_generator.manual_seed(seed)
        if self._device is not None:
            torch.cuda.default_generators[self._device.index].manual_seed(seed)

    def differ(self, states: list[Tensor]) -> bool:
        """Whether anything has been drawn since :meth:`get`."""
        return any(not torch.equal(now, then) for now, then in zip(self.get(), states, strict=True))
