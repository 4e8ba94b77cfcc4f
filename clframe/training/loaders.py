"""Loaders of a strategy: from memory, or Avalanche's if something has changed the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clframe.avalanche_bridge.imports import OnlineCLExperience
from clframe.data.benchmark import Benchmark
from clframe.data.epoch_loader import EpochLoader, count_batches
from clframe.data.samples import Loadable, concatenate
from clframe.data.source import Data
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.frozen import evaluating
from clframe.training.budget import TrainingPlan
from clframe.training.learner import Learner
from clframe.training.shared_reading import read_together


def needs_two_samples(model: nn.Module, x: Tensor) -> bool:
    """Whether batch normalization in ``model`` sees one value per channel of one input ``x``.

    It cannot train on one sample then: the variance of a single value is zero, and torch raises ValueError.

    >>> needs_two_samples(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.zeros(1, 3))
    True
    >>> needs_two_samples(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.zeros(1, 1, 8, 8))
    False
    """
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    single: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        single.append(inputs[0].shape[2:].numel() == 1)

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        if norms:
            parameter = next(model.parameters())
            x = x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)
            with evaluating(model):
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return any(single)


class Serving:
    """Mixin of a strategy: serves a :class:`Benchmark` from memory, pooled with a replay buffer where asked for."""

    learner: Learner | None
    model: nn.Module
    benchmark: Benchmark | None
    limit_batches: int | None
    plan: TrainingPlan | None
    _planned: int | None
    drop_last: bool
    # Declared for readers; Avalanche's template provides them.
    experience: Any
    device: torch.device
    train_mb_size: int
    train_epochs: int
    eval_mb_size: int
    dataloader: Any
    adapted_dataset: Any
    mbatch: Any
    mb_y: Tensor
    clock: Any
    group: Any
    _part: int

    _own_loader: EpochLoader | None = None
    _unchanged_dataset: Any = None
    _avalanche: Any = None
    _lazy_stream: tuple[Any, list[Any]] | None = None
    pool_owner: Any = None

    def serve(self, benchmark: Benchmark | None) -> None:
        """Serve the experiences of ``benchmark`` from memory."""
        pooling = () if self.learner is None else self.learner.composition.acting_at("training_set")
        self.pool_owner = next(iter(pooling), None)
        self.benchmark = None if benchmark is None else benchmark.to(self.device)
        self._avalanche = None if benchmark is None else benchmark.avalanche

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Join the data of every experience that the strategy trains on."""
        super().train_dataset_adaptation(**kwargs)  # type: ignore[misc]
        sources = self._sources()
        if sources and sources != (self.experience.current_experience,):
            first, *rest = (self._experience_at(i).dataset.train() for i in sources)
            for dataset in rest:
                first = first.concat(dataset)
            self.adapted_dataset = first
        self._unchanged_dataset = self.adapted_dataset

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Serve our benchmark from memory, unless a plugin has changed the data; else use Avalanche's loader."""
        self._own_loader = None
        parts = [self._samples_of(self._experience_at(i), "train") for i in self._sources()]
        changed = self.adapted_dataset is not self._unchanged_dataset
        labeled = self.benchmark is not None and self.benchmark.task_labels and len(parts) > 1
        drop_last = kwargs.setdefault("drop_last", self.drop_last)
        if not parts or None in parts or changed or labeled:
            self._refuse_pool()
            if parts:  # otherwise nothing is trained on
                self._refuse_foreign_loader()
            super().make_train_dataloader(**kwargs)  # type: ignore[misc]
            return
        assert self.learner is not None or self.benchmark is not None
        seed = torch.initial_seed() if self.learner is None or self.learner.seed is None else self.learner.seed
        samples, size = self._pool(concatenate([part for part in parts if part is not None]))
        self._own_loader = EpochLoader(
            read_together(samples, self.group),
            size,
            shuffle=kwargs.get("shuffle", True),
            seed=seed,
            experience=self.experience.current_experience,
            drop_last=drop_last,
            join_single=not drop_last and self._must_join_single(samples, len(samples), size),
        )
        self.dataloader = self._own_loader

    def eval_dataset_adaptation(self, **kwargs: Any) -> None:
        """Adapt as Avalanche does, and remember the result to notice a plugin's changes."""
        super().eval_dataset_adaptation(**kwargs)  # type: ignore[misc]
        self._unchanged_dataset = self.adapted_dataset

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Serve our streams from memory, unless a plugin has changed the data; else use Avalanche's loader."""
        samples = self._samples_of(self.experience, "train", "test", "valid")
        if samples is None or self.adapted_dataset is not self._unchanged_dataset:
            self._refuse_foreign_loader()
            super().make_eval_dataloader(**kwargs)  # type: ignore[misc]
        else:
            self.dataloader = EpochLoader(read_together(samples, self.group), self.eval_mb_size)

    def count_steps(self, experience: Any) -> int:
        """Return the number of steps of ``train(experience)`` on our own benchmark; within a budget, those expected."""
        index, stream = int(experience.current_experience), self.stream_of(experience)
        if self.plan is not None:
            return self.plan.experiences[index].steps
        sources = (index,) if self.learner is None else self.learner.training_experiences(index, len(stream))
        total = sum(len(stream[i].dataset) for i in sources)
        size = self.train_mb_size
        samples = self._samples_of(experience, "train")
        if self.pool_owner is not None and samples is not None:
            pooled, size = self._pool(samples)
            total = len(pooled)
        # Without our samples the loader is Avalanche's, which joins nothing.
        join_single = samples is not None and not self.drop_last and self._must_join_single(samples, total, size)
        batches = count_batches(total, size, drop_last=self.drop_last, join_single=join_single)
        if self.limit_batches is not None:
            batches = min(batches, self.limit_batches)
        return batches * int(self.train_epochs)

    @property
    def mb_task_id(self) -> Tensor:
        """Task labels of the batch; the experience's, or 0, for samples whose loader or memory has none."""
        labels: Tensor = self.mbatch[-1] if len(self.mbatch) > 2 else self.mb_y[:0]
        missing = len(self.mb_y) - len(labels)
        own = int(getattr(self.experience, "task_label", 0))
        return torch.cat([labels, labels.new_full((missing,), own)]) if missing > 0 else labels

    def _must_join_single(self, samples: Loadable, total: int, size: int) -> bool:
        """Whether the last batch has one sample, on which the network cannot train.

        Args:
            samples: Any of the samples, to measure the shapes in the network.
            total: Number of samples of an epoch.
            size: Samples per batch.

        Raises:
            ConfigError: No batch to join it to, and no replayed samples either.
        """
        alone = size == 1 or total == 1
        if total % size != 1 and not alone:
            return False
        model: nn.Module = self.model if self.learner is None else self.learner.network
        if not needs_two_samples(model, samples.prepare(samples.raw(torch.tensor([0])))):
            return False
        if alone and (self.learner is None or not self.learner.composition.acting_at("make_batch")):
            key, found = ("trainer.batch_size", size) if size == 1 else ("benchmark.online", total)
            raise ConfigError(
                f"{key}: found a training batch of one sample, for which batch normalization over one value per "
                f"channel is undefined; give more samples than {found}, or use another backbone"
            )
        return not alone

    # --- experiences and batches ------------------------------------------------------------------

    def _current_experience(self) -> tuple[Any, int, int]:
        """The experience that the learner sees, and which part of how many of it the current one is."""
        experience = self.experience
        if isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries:
            part = 0 if experience.is_first_subexp else self._part + 1
            return experience.origin_experience, part, int(experience.sub_stream_length)
        return experience, 0, 1

    def _is_last_batch(self) -> bool:
        return int(self.clock.train_epoch_iterations) + 1 == self._count_batches()

    def _count_batches(self) -> int:
        """Return the batches of the epoch."""
        limits = (limit for limit in (self.limit_batches, self._planned) if limit is not None)
        return min((len(self.dataloader), *limits))

    def _sources(self) -> tuple[int, ...]:
        index = int(self.experience.current_experience)
        if self.learner is None:
            return (index,)
        return self.learner.training_experiences(index, len(self.stream_of(self.experience)))

    def _pool(self, samples: Data) -> tuple[Loadable, int]:
        """The samples of an epoch and its batch size, as the owner of the pool makes them."""
        owner = self.pool_owner
        if owner is None:
            return samples, self.train_mb_size
        assert self.learner is not None
        pooled, size = owner.training_set(samples, self.train_mb_size, self.learner.state[owner.name])
        return cast(Loadable, pooled), size

    def _refuse_pool(self) -> None:
        """Refuse a pooling component where Avalanche's loader is used, which serves Avalanche's data sets only."""
        if self.pool_owner is not None:
            raise UnsupportedError(
                f"LightningStrategy: '{self.pool_owner.name}' changes what the loader serves, but Avalanche's own "
                f"loader is in use here; serve the data through benchmark=, without plugins that change it, or let "
                f"replay join each batch"
            )

    def _refuse_foreign_loader(self) -> None:
        """Refuse Avalanche's loaders where several processes share batches: theirs have other samples in each."""
        if self.group is not None:
            raise UnsupportedError(
                "trainer.devices: several devices need data that our own loader serves, but this experience comes from "
                "Avalanche's; train on one device"
            )

    def _experience_at(self, index: int) -> Any:
        if index == self.experience.current_experience:
            return self.experience
        return self.stream_of(self.experience)[index]

    def stream_of(self, experience: Any) -> Sequence[Any]:
        """Return the stream of an experience; a lazy one, as of ``split_online_stream``, is read to its end, once.

        Raises:
            UnsupportedError: It can be read only once.
        """
        stream = experience.origin_stream
        if hasattr(stream, "__len__"):
            return cast(Sequence[Any], stream)
        if self._lazy_stream is None or self._lazy_stream[0] is not stream:
            if isinstance(stream.exps_iter, Iterator):
                raise UnsupportedError(
                    f"LightningStrategy: found the stream '{stream.name}' of an iterator, which can be read only once; "
                    f"make it of a list of experiences"
                )
            self._lazy_stream = (stream, list(stream))
        return self._lazy_stream[1]

    def _samples_of(self, experience: Any, *streams: str) -> Data | None:
        """The samples of an experience of our own benchmark in one of the streams, or None."""
        benchmark, index = self.benchmark, int(experience.current_experience)
        if benchmark is None or self._avalanche is None:
            return None
        data: dict[str, tuple[Data, ...]] = {"train": benchmark.train, "original_train": benchmark.original,
                                             "test": benchmark.test, "valid": benchmark.validation}  # fmt: skip
        for stream in streams:
            # Avalanche copies experiences into streams without a benchmark, so only their data identifies them.
            ours = self._avalanche.streams.get(stream, ())
            if index < len(ours) and ours[index].dataset is experience.dataset:
                return data[stream][index]
        return None

    def _held_out(self, experience: Any) -> tuple[Data, ...]:
        """Validation data of our benchmark up to ``experience``."""
        ours = self._samples_of(experience, "train", "original_train") is not None
        if not ours or self.benchmark is None:
            return ()
        return self.benchmark.validation[: int(experience.current_experience) + 1]
