"""Avalanche's BiC with its definitions changed to ours, one at a time or together.

Avalanche's ``cross_entropy`` takes the teacher's softmax over the samples of a batch, which makes the distillation weaker
by as many times as a batch has samples for each old class; it replays by joining a batch of memory to each batch of new
data; it holds samples out beside the memory; it keeps the pair (alpha, beta) of the last experience only, and fits it
by 200 epochs of SGD, where nothing pulls alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.models.bic_model import BiasLayer
from avalanche.training.plugins import BiCPlugin
from peer_course import Maker, Setting, plugged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from clframe.functional.class_incremental import fit_bias

Change = Literal["softmax", "pool", "memory", "pairs", "fit"]


class SoftmaxOverClasses(BiCPlugin):
    """Distills the teacher's probabilities of the old classes, a softmax for each sample."""

    def cross_entropy(self, new_outputs: Tensor, old_outputs: Tensor) -> Tensor:
        return F.cross_entropy(new_outputs / self.T, (old_outputs / self.T).softmax(1))


class OnePool(BiCPlugin):
    """An epoch runs once over new data and memory together."""

    def before_training_exp(self, strategy: Any, *arguments: Any, **options: Any) -> None:
        super().before_training_exp(strategy, *arguments, **options)
        if len(self.storage_policy.buffer):
            pool = concat_datasets([strategy.adapted_dataset, self.storage_policy.buffer])
            strategy.dataloader = DataLoader(pool, batch_size=strategy.train_mb_size, shuffle=True)


class EveryPair(BiCPlugin):
    """Logits stay corrected by the pairs of all experiences, in training too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers = nn.ModuleList()

    def bias_forward(self, input_data: Tensor) -> Tensor:
        for layer in self.layers:
            input_data = layer(input_data)
        return input_data

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.mb_output = self.bias_forward(strategy.mb_output)

    def bias_correction_step(self, strategy: Any, *arguments: Any, **options: Any) -> None:
        model, strategy.model = strategy.model, nn.Sequential(strategy.model, *self.layers)
        super().bias_correction_step(strategy, *arguments, **options)
        strategy.model = model
        self.layers.append(self.bias_layer)


class ExactFit(BiCPlugin):
    """The pair is the one minimum of the cross-entropy and a pull of both towards (1, 0)."""

    def bias_correction_step(self, strategy: Any, *arguments: Any, **options: Any) -> None:
        strategy.model.eval()
        held = concat_datasets([kept.buffer for kept in self.val_buffer.values()])
        samples = [held[i] for i in range(len(held))]
        with torch.no_grad():
            logits_NC = strategy.model(torch.stack([sample[0] for sample in samples]))
        y_N = torch.tensor([int(sample[1]) for sample in samples])
        self.bias_layer = BiasLayer(strategy.adapted_dataset.targets.uniques)
        alpha, beta = fit_bias(logits_NC, y_N, new=self.bias_layer.clss.tolist(), decay=0.1)
        self.bias_layer.alpha.data.fill_(alpha)
        self.bias_layer.beta.data.fill_(beta)
        self.bias_layer.requires_grad_(False)


CHANGES: dict[Change, type[BiCPlugin]] = {
    "softmax": SoftmaxOverClasses, "pool": OnePool, "pairs": EveryPair, "fit": ExactFit,
}  # fmt: skip
"""Order matters: whoever keeps every pair comes before whoever fits one."""


def bic(*changes: Change) -> Maker:
    """Avalanche's BiC, with ``memory`` counting held-out samples and with other definitions of ours."""
    bases = tuple(made for name, made in CHANGES.items() if name in changes)
    changed: Callable[..., BiCPlugin] = type("Changed", (*bases, BiCPlugin), {})

    def make(setting: Setting) -> BiCPlugin:
        memory = setting.memory
        if "memory" not in changes:
            return changed(mem_size=memory, val_percentage=0.1)
        kept = memory - memory // 10
        return changed(mem_size=kept, val_percentage=(memory - kept + 0.5) / kept)

    return plugged(make)
