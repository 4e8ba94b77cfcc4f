"""Requests to a server of two segments, and a runner that a test can stop before a segment."""

from __future__ import annotations

import asyncio
import threading

import torch
from torch import nn

from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.exits.segment_runners import PlainRunner
from clframe.nn import Head, Network
from clframe.nn.backbones import Backbone

EASY, HARD = 20 * torch.eye(6)[2], torch.zeros(6)


class AsItIs(Head):
    def grow(self, classes):
        return False

    def forward(self, features, previous_BC=None):
        return features


def two_segments() -> DynamicNetwork:
    """An exit on the input itself: EASY stops there, HARD does not."""
    stages = [("in", nn.Identity(), (6,)), ("out", nn.Linear(6, 6), (6,))]
    net = Network(Backbone(stages, input_shape=(6,)), exits=[("in", AsItIs())]).eval()
    net.grow(range(6))
    return DynamicNetwork(net, ExitPolicy(thresholds=0.9))


class Held(PlainRunner):
    """Waits before a segment until it is released."""

    def __init__(self, dynamic, segment):
        super().__init__(dynamic)
        self.segment, self.started, self.release = segment, threading.Event(), threading.Event()

    def run(self, segment, rows):
        if segment == self.segment:
            self.started.set()
            assert self.release.wait(30)
        return super().run(segment, rows)

    async def reached(self):
        await asyncio.to_thread(self.started.wait, 30)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def turns(count=20):
    """Let other tasks of the event loop run."""
    for _ in range(count):
        await asyncio.sleep(0)
