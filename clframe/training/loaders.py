"""Where the samples of an experience come from: our own loader, or Avalanche's where something has changed the data."""

from __future__ import annotations

from typing import Any, cast

import torch

from clframe.data.benchmark import Benchmark
from clframe.data.samples import EpochLoader, Loadable, concatenate
from clframe.data.source import Data
from clframe.errors import UnsupportedError
from clframe.training.learner import Learner


class Serving:
    """The part of a strategy that serves a :class:`Benchmark` from memory and pools it with what replay keeps."""

    learner: Learner | None
    benchmark: Benchmark | None
    limit_batches: int | None
    # Declared for readers; Avalanche's template provides them.
    experience: Any
    device: torch.device
    train_mb_size: int
    train_epochs: int
    eval_mb_size: int
    dataloader: Any
    adapted_dataset: Any

    _own_loader: EpochLoader | None = None
    _untouched: Any = None
    _avalanche: Any = None
    _pool_owner: Any = None

    def serve(self, benchmark: Benchmark | None) -> None:
        """Serve the experiences of ``benchmark`` from memory from now on."""
        pooling = () if self.learner is None else self.learner.composition.acting_at("training_set")
        self._pool_owner = next(iter(pooling), None)
        self.benchmark = None if benchmark is None else benchmark.to(self.device)
        self._avalanche = None if benchmark is None else benchmark.avalanche

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """The data of every experience that the strategy names as a source of this one."""
        super().train_dataset_adaptation(**kwargs)  # type: ignore[misc]
        sources = self._sources()
        if sources and sources != (self.experience.current_experience,):
            first, *rest = (self._experience_at(i).dataset.train() for i in sources)
            for dataset in rest:
                first = first.concat(dataset)
            self.adapted_dataset = first
        self._untouched = self.adapted_dataset

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Our loader for our benchmark, unless a plugin has changed the data; else Avalanche's."""
        self._own_loader = None
        parts = [self._samples_of(self._experience_at(i), "train") for i in self._sources()]
        changed = self.adapted_dataset is not self._untouched
        labeled = self.benchmark is not None and self.benchmark.task_labels and len(parts) > 1
        if not parts or None in parts or changed or labeled or kwargs.get("drop_last"):
            self._refuse_pool()
            super().make_train_dataloader(**kwargs)  # type: ignore[misc]
            return
        assert self.learner is not None or self.benchmark is not None
        seed = torch.initial_seed() if self.learner is None or self.learner.seed is None else self.learner.seed
        samples, size = self._pooled(concatenate([part for part in parts if part is not None]))
        self._own_loader = EpochLoader(
            samples,
            size,
            shuffle=kwargs.get("shuffle", True),
            seed=seed,
            experience=self.experience.current_experience,
        )
        self.dataloader = self._own_loader

    def eval_dataset_adaptation(self, **kwargs: Any) -> None:
        """Avalanche's, remembered so that a plugin's changes are noticed."""
        super().eval_dataset_adaptation(**kwargs)  # type: ignore[misc]
        self._untouched = self.adapted_dataset

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Our loader for our benchmark's streams, unless a plugin has changed the data; else Avalanche's."""
        samples = self._samples_of(self.experience, "train", "test", "valid")
        if samples is None or self.adapted_dataset is not self._untouched:
            super().make_eval_dataloader(**kwargs)  # type: ignore[misc]
        else:
            self.dataloader = EpochLoader(samples, self.eval_mb_size)

    def planned_steps(self, experience: Any) -> int:
        """Training steps that ``train(experience)`` will take on our own benchmark."""
        index, count = int(experience.current_experience), len(experience.origin_stream)
        sources = (index,) if self.learner is None else self.learner.training_experiences(index, count)
        total = sum(len(experience.origin_stream[i].dataset) for i in sources)
        size = self.train_mb_size
        samples = self._samples_of(experience, "train")
        if self._pool_owner is not None and samples is not None:
            pooled, size = self._pooled(samples)
            total = len(pooled)
        batches: int = -(-total // size)
        if self.limit_batches is not None:
            batches = min(batches, self.limit_batches)
        return batches * int(self.train_epochs)

    # --- where things are -------------------------------------------------------------------------

    def _sources(self) -> tuple[int, ...]:
        index = int(self.experience.current_experience)
        if self.learner is None:
            return (index,)
        return self.learner.training_experiences(index, len(self.experience.origin_stream))

    def _pooled(self, samples: Data) -> tuple[Loadable, int]:
        """What an epoch runs over and the size of its batches, as the component that pools wants it."""
        owner = self._pool_owner
        if owner is None:
            return samples, self.train_mb_size
        assert self.learner is not None
        pooled, size = owner.training_set(samples, self.train_mb_size, self.learner.state[owner.name])
        return cast(Loadable, pooled), size

    def _refuse_pool(self) -> None:
        """A loader of Avalanche's serves what Avalanche's data sets hold, which no memory of ours can join."""
        if self._pool_owner is not None:
            raise UnsupportedError(
                f"LightningStrategy: '{self._pool_owner.name}' changes what the loader serves, but Avalanche's own "
                f"loader is in use here; serve the data through benchmark=, without plugins that change it, or let "
                f"replay join each batch"
            )

    def _experience_at(self, index: int) -> Any:
        if index == self.experience.current_experience:
            return self.experience
        return self.experience.origin_stream[index]

    def _samples_of(self, experience: Any, *streams: str) -> Data | None:
        """The samples of an experience of our own benchmark, which is in one of the streams, or None."""
        benchmark, index = self.benchmark, int(experience.current_experience)
        if benchmark is None or self._avalanche is None:
            return None
        data: dict[str, tuple[Data, ...]] = {"train": benchmark.train, "original_train": benchmark.original,
                                             "test": benchmark.test, "valid": benchmark.validation}  # fmt: skip
        for stream in streams:
            # Avalanche copies experiences and hangs them on streams that know no benchmark; data stays itself.
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
