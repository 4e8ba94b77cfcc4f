"""Optimizers and schedules from configs, by arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.build import build_optimizer, build_scheduler
from clframe.config.schema import OptimizerConfig


def rates(config, epochs):
    """The learning rate of every epoch."""
    optimizer = build_optimizer(config)([torch.nn.Parameter(torch.zeros(1))])
    make = build_scheduler(config, epochs)
    scheduler = None if make is None else make(optimizer)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


@pytest.mark.parametrize(
    "options, factors",
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "step": 2, "gamma": 0.5}, [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        ({"schedule": "multistep", "milestones": (1, 4), "gamma": 0.5}, [1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]),
        ({"warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ({"warmup": 1, "schedule": "step", "step": 2, "gamma": 0.5}, [1 / 2, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        ({"warmup": 2, "schedule": "cosine"},
         [f * (1 + math.cos(math.pi * t / 6)) / 2 for t, f in enumerate([1 / 3, 2 / 3, 1, 1, 1, 1])]),
    ],
)  # fmt: skip
def test_schedules(options, factors):
    found = rates(OptimizerConfig(lr=0.2, **options), 6)
    assert found == pytest.approx([0.2 * factor for factor in factors], rel=1e-12)


@pytest.mark.parametrize(
    "config, kind, options",
    [
        (OptimizerConfig(name="sgd", momentum=0.5), torch.optim.SGD, {"momentum": 0.5}),
        (OptimizerConfig(name="rmsprop", momentum=0.5, weight_decay=0.1), torch.optim.RMSprop,
         {"momentum": 0.5, "weight_decay": 0.1}),
        (OptimizerConfig(name="adam"), torch.optim.Adam, {"betas": (0.9, 0.999)}),
        (OptimizerConfig(name="adamw", betas=(0.8, 0.9)), torch.optim.AdamW, {"betas": (0.8, 0.9)}),
    ],
)  # fmt: skip
def test_optimizers(config, kind, options):
    optimizer = build_optimizer(config)([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == config.lr
    assert {key: optimizer.param_groups[0][key] for key in options} == options
