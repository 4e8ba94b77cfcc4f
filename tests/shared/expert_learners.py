"""Learners of small transformers whose feed-forward networks are divided into experts."""

from __future__ import annotations

import torch

from clframe.core import compose
from clframe.nn import BACKBONES, Network
from clframe.training.learner import Learner

VIT = {"patch": 4, "width": 8, "depth": 2, "heads": 2}
QUICK = {"epochs": 1, "samples": 40, "router_width": 64}
"""Wide enough that no token's scores are all zero, which would say nothing and run all."""


def learner(*components, backbone="vit_tiny", shape=(1, 8, 8), seed=0, **options):
    torch.manual_seed(seed)
    net = BACKBONES.get(backbone)(shape, **(VIT if backbone == "vit_tiny" and not options else options))
    return Learner(Network(net), compose(*components), seed=seed)


def digits(on_digits, count=8):
    samples = on_digits.samples(range(6), count, part="test")
    return samples.prepare(samples.raw(torch.arange(len(samples))))


@torch.no_grad()
def logits(run, x):
    return run.network.eval()(x).logits


def close(ours, theirs, tolerance=2e-4):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
