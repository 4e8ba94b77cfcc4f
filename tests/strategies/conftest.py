"""Short runs on digits without an engine, for what a method does to a network."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clframe.core import Batch, Experience, Step, StepContext, compose
from clframe.data import TensorSamples
from clframe.data.sources.characters import digits
from clframe.nn import BACKBONES, Network
from clframe.seeding import generator_for
from clframe.training.learner import Learner


class DigitRuns:
    """Three experiences of two digits each."""

    groups = ((0, 1), (2, 3), (4, 5))

    def __init__(self) -> None:
        self.source = digits()

    def learner(self, *components, backbone="small_cnn", seed=0, width=8):
        torch.manual_seed(seed)
        network = Network(BACKBONES.get(backbone)((1, 8, 8), width=width))
        return Learner(network, compose(*components), seed=seed)

    def samples(self, classes, per_class, *, part="train"):
        data = getattr(self.source, part)
        return data.subset(torch.cat([(data.y == c).nonzero().flatten()[:per_class] for c in classes]))

    def experience(self, index, *, per_class=40):
        past = tuple(c for group in self.groups[:index] for c in group)
        return Experience(index, 3, self.groups[index], past, (), self.samples(self.groups[index], per_class))

    def learn(self, run, *, first=0, last=3, epochs=3, per_class=40, lr=0.05):
        """Experiences ``first`` to ``last``, in batches of 16, by SGD."""
        for index in range(first, last):
            experience = self.experience(index, per_class=per_class)
            samples = experience.samples
            run.begin(experience, classes=experience.classes, epochs=epochs)
            optimizer = partial(torch.optim.SGD, lr=lr)(run.network.parameters())
            for epoch in range(epochs):
                run.network.train()
                run.before_epoch(epoch)
                for chosen in torch.randperm(len(samples)).split(16):
                    batch = run.make_batch(samples.prepare(samples.raw(chosen)), samples.y[chosen])
                    loss = run.loss(batch, run.network(batch.x, taps=run.taps)).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    run.modify_gradients()
                    optimizer.step()
                    run.after_step()
            run.end()
        return run

    @torch.no_grad()
    def accuracy(self, run, classes):
        """Of every exit, on test samples of these classes."""
        samples = self.samples(classes, 30, part="test")
        output = run.network.eval()(samples.prepare(samples.raw(torch.arange(len(samples)))), taps=run.taps)
        answers = run.adjust_logits(output)
        return [(logits_BC.argmax(1) == samples.y).float().mean().item() for logits_BC in answers.logits]

    def step(self, run, y, *, classes=(2, 3), past=(0, 1)):
        """A step of the second experience on random images, whose taps are all there."""
        generator = generator_for(0, 0)
        x, y = torch.randn(len(y), 1, 8, 8, generator=generator), torch.tensor(y)
        context = StepContext(Experience(1, 3, classes, past, (), TensorSamples(x, y)), 0, 1, generator)
        return Step(Batch(x, y), run.network(x, taps=run.taps), context, run.network)

    def changed(self, run, *, classes=(2, 3)):
        """The run, grown by ``classes``, after its backbone has moved a little."""
        run.network.grow(classes)
        with torch.no_grad():
            for parameter in run.network.backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return run


@pytest.fixture(scope="session")
def on_digits():
    return DigitRuns()
