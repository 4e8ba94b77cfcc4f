"""Defaults of a config that depend on the device: the choices for ``auto`` on CUDA and elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from clframe.config.schema import Config
from clframe.config.trainer import TrainerConfig

FUSED = ("sgd", "adam", "adamw")
"""Optimizers with an update of all weights in one CUDA kernel."""
EVALUATION_BATCH, MOST_EVALUATION_BATCH = 256, 1024
"""Samples per batch of an evaluation on every device; the most on CUDA."""
PHOTOGRAPH = (3, 224, 224)
MOST_LOGITS = {False: 2**24, True: 2**27}
"""Logits of a batch of text in an evaluation, on the CPU and on CUDA."""


def on_cuda(config: TrainerConfig) -> bool:
    """Whether a run trains on a CUDA device."""
    return config.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()


def with_device_defaults(
    config: Config, *, cuda: bool, input_shape: Sequence[int] = (), vocabulary: int = 0
) -> Config:
    """Return the config with every ``auto`` replaced by the choice for the device, measured in perf/gpu_race.py.

    ``trainer.capture`` stays as it is: whether steps can be recorded may change between experiences.
    """
    trainer, optimizer = config.trainer, config.optimizer
    fused = cuda and optimizer.name in FUSED and trainer.precision != "16-mixed"
    trainer = replace(
        trainer,
        channels_last=cuda if trainer.channels_last == "auto" else trainer.channels_last,
        deterministic=not cuda if trainer.deterministic == "auto" else trainer.deterministic,
        eval_batch_size=(
            evaluation_batch(input_shape, cuda=cuda, vocabulary=vocabulary)
            if trainer.eval_batch_size == "auto"
            else trainer.eval_batch_size
        ),
    )
    optimizer = replace(optimizer, fused=fused if optimizer.fused == "auto" else optimizer.fused)
    return replace(config, trainer=trainer, optimizer=optimizer)


def evaluation_batch(input_shape: Sequence[int], *, cuda: bool, vocabulary: int = 0) -> int:
    """Samples per batch of an evaluation: 256, and on CUDA as many as need no more memory than 256 photographs.

    Small batches leave a GPU idle; more than 1,024 samples of 3x32x32 do not shorten an evaluation of ResNet32. Of a
    language model with this ``vocabulary``, as many windows as have 2^24 logits (64 MiB), on CUDA 2^27.

    >>> evaluation_batch((3, 32, 32), cuda=True), evaluation_batch((3, 112, 112), cuda=True)
    (1024, 1024)
    >>> evaluation_batch((3, 224, 224), cuda=True), evaluation_batch((3, 32, 32), cuda=False)
    (256, 256)
    >>> evaluation_batch((129,), cuda=False, vocabulary=2048)
    64
    """
    if vocabulary:
        logits = (input_shape[0] - 1) * vocabulary
        return min(max(MOST_LOGITS[cuda] // logits, 1), MOST_EVALUATION_BATCH)
    if not cuda:
        return EVALUATION_BATCH
    photographs = EVALUATION_BATCH * math.prod(PHOTOGRAPH) // max(math.prod(input_shape), 1)
    return min(max(photographs, EVALUATION_BATCH), MOST_EVALUATION_BATCH)
