"""The loader of an experience: batches of its samples, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Generator, Tensor

from clframe.data.samples import Loadable
from clframe.errors import ConfigError
from clframe.seeding import derive_seed, epoch_order, generator_for


def count_batches(samples: int, size: int, *, drop_last: bool = False, join_single: bool = False) -> int:
    """Number of batches of an epoch over ``samples`` samples; for the options see :class:`EpochLoader`.

    >>> count_batches(65, 32), count_batches(65, 32, join_single=True), count_batches(65, 32, drop_last=True)
    (3, 2, 2)
    """
    full, rest = divmod(samples, size)
    return full + (rest > 0 and not drop_last and not (join_single and rest == 1 and full > 0))


class EpochLoader:
    """Batches of one experience, in an order that is a function of (seed, experience, epoch).

    Set :attr:`epoch` before iterating. With ``shuffle`` (training), batches are augmented, with draws that are a
    function of the same three numbers. Without it (evaluation), the order is that of the samples and nothing is
    augmented. The last batch may be smaller.

    Args:
        samples: The data.
        batch_size: Samples per batch.
        shuffle: Whether to shuffle and augment.
        seed: Seed of the run.
        experience: Index of the experience.
        drop_last: Leave out a last batch of fewer samples.
        join_single: Append a last batch of one sample to the batch before it.

    Raises:
        ConfigError: ``drop_last`` with fewer samples than a batch, which leaves nothing to train on.

    >>> from clframe.data.samples import TensorSamples
    >>> data = TensorSamples(torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 1]))
    >>> [len(y) for _, y in EpochLoader(data, 2)], [len(y) for _, y in EpochLoader(data, 2, join_single=True)]
    ([2, 1], [3])
    """

    def __init__(
        self,
        samples: Loadable,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        experience: int = 0,
        drop_last: bool = False,
        join_single: bool = False,
    ) -> None:
        if drop_last and len(samples) < batch_size:
            raise ConfigError(
                f"trainer.drop_last: found {len(samples)} training samples in experience {experience}, fewer than a "
                f"batch of {batch_size}; lower trainer.batch_size or set trainer.drop_last=false"
            )
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.experience = experience
        self.epoch = 0
        self.drop_last = drop_last
        self.join_single = join_single
        self._order: Tensor | None = None  # of the epoch being read, for stored()
        self._augmenting: Generator | None = None  # of the epoch being read
        self._skipped: tuple[int, Tensor | None] = (0, None)

    def __len__(self) -> int:
        return count_batches(
            len(self.samples), self.batch_size, drop_last=self.drop_last, join_single=self.join_single
        )

    def __iter__(self) -> Iterator[list[Tensor]]:
        samples, size, position = self.samples, self.batch_size, (self.experience, self.epoch)
        seed = derive_seed(self.seed, "read", *position)
        whole = self._whole_batches()
        order: Tensor | None = None
        generator: Generator | None = None
        if self.shuffle:
            order = epoch_order(len(samples), seed=self.seed, experience=self.experience, epoch=self.epoch)
            generator = generator_for(self.seed, "augment", *position)
        elif whole is not None:
            order = torch.arange(len(samples))
        self._order, self._augmenting = order, generator
        (first, state), self._skipped = self._skipped, (0, None)
        if generator is not None and state is not None:
            generator.set_state(state)
        if whole is None or order is None:
            return samples.batches(order, size, generator=generator, seed=seed, first=first)
        batches: Iterator[list[Tensor]] = iter(())
        if first * size < whole:  # an empty order would make an empty batch
            batches = samples.batches(order[:whole], size, generator=generator, seed=seed, first=first)
        if self.drop_last:
            return batches
        last = samples.batches(order[whole:], size + 1, generator=generator, seed=derive_seed(seed, "last"))
        return chain(batches, last)

    def skip(self, batches: int, augmentation: Tensor) -> None:
        """Leave out the first batches of the next epoch without reading them.

        Args:
            batches: Their number, less than those of the epoch.
            augmentation: What :meth:`augmentation_state` has returned after these batches.
        """
        self._skipped = batches, augmentation

    def augmentation_state(self) -> Tensor:
        """Return the state of the generator that augments the epoch being read."""
        assert self._augmenting is not None, "no epoch of training is being read"
        return self._augmenting.get_state()

    def stored(self, number: int, count: int) -> Tensor:
        """Return the stored inputs of batch ``number`` of this epoch, which has ``count`` samples."""
        first = number * self.batch_size
        index = torch.arange(first, first + count) if self._order is None else self._order[first : first + count]
        return self.samples.raw(index)

    def _whole_batches(self) -> int | None:
        """Samples in batches of ``batch_size``, if ``drop_last`` or ``join_single`` changes the batch after them."""
        full, rest = divmod(len(self.samples), self.batch_size)
        if self.drop_last and rest:
            return full * self.batch_size
        if self.join_single and rest == 1 and full:
            return (full - 1) * self.batch_size
        return None
