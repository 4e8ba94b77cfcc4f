"""Small models that learned digits, and the comparison of their exports with them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from clframe.core import Experience, compose, parse
from clframe.data.sources.characters import digits
from clframe.nn import BACKBONES, Network
from clframe.training.learner import Learner
from clframe.training.trained import TrainedModel

BATCHES = (1, 33)
SOURCE = digits()


def images(count):
    """Real digits, and random bytes."""
    random = torch.randint(0, 17, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return SOURCE.test.x[:count], random


def learn(strategy, *, backbone="small_cnn", held_out=False, **options):
    """A model that learned six digits in two experiences, with a few steps of SGD and no engine."""
    torch.manual_seed(0)
    network = Network(BACKBONES.get(backbone)((1, 8, 8), **(options or {"width": 8})))
    learner = Learner(network, parse(strategy) if isinstance(strategy, str) else compose(*strategy), seed=0)
    held = []
    for index, classes in enumerate([(0, 1, 2), (3, 4, 5)]):
        chosen = torch.cat([(SOURCE.train.y == c).nonzero().flatten()[:40] for c in classes])
        samples, past = SOURCE.train.subset(chosen), tuple(range(3 * index))
        held.append(SOURCE.test.subset(torch.isin(SOURCE.test.y, torch.tensor(classes)).nonzero().flatten()))
        experience = Experience(index, 2, classes, past, (), samples, tuple(held) if held_out else ())
        learner.begin(experience, classes=classes, epochs=2)
        optimizer = partial(torch.optim.SGD, lr=0.05)(network.parameters())
        for epoch in range(2):
            network.train()
            learner.before_epoch(epoch)
            for at in torch.randperm(len(samples)).split(16):
                batch = learner.make_batch(samples.prepare(samples.raw(at)), samples.y[at])
                optimizer.zero_grad()
                learner.loss(batch, network(batch.x, taps=learner.taps)).sum().backward()
                learner.modify_gradients()
                optimizer.step()
                learner.after_step()
        learner.end()
    network.eval().requires_grad_(False)
    return TrainedModel(learner, (7, 3, 9, 0, 1, 4), SOURCE.train.mean, SOURCE.train.std)


def assert_whole(model, found, x):
    """Every exit, the prediction and its class, as clframe computes them."""
    output = model.outputs(x)
    expected = torch.stack([scores_BC.softmax(1) for scores_BC in output.logits], 1)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], model.learner.predict(output).softmax(1), rtol=0, atol=1e-4)
    assert torch.equal(found[2], model.classify(x))


def assert_staged(model, runner, x, *, threshold=None, given=None):
    """The same exits and probabilities as dynamic inference, and the cost of the exit where each sample stopped."""
    scores_BC, exit_B = model.dynamic(threshold=threshold)(model.prepare(x))
    found = runner(x.numpy() if runner.description["format"] == "onnx" else x, threshold=given)
    assert np.asarray(found.exits).tolist() == exit_B.tolist()
    np.testing.assert_allclose(np.asarray(found.probabilities), scores_BC.softmax(1).numpy(), rtol=0, atol=1e-4)
    assert np.asarray(found.classes).tolist() == model.ids(scores_BC).tolist()
    return found
