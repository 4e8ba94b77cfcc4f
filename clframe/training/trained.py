"""A trained model to predict with, as a run left it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clframe.core import Composition
from clframe.data.benchmark import Benchmark
from clframe.data.samples import TensorSamples
from clframe.errors import RunFolderError, UnsupportedError
from clframe.exits import ExitPolicy
from clframe.exits.dynamic import DynamicNetwork
from clframe.moe.pipeline import Recipe
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.checkpoint import decode, load_latest
from clframe.training.learner import Learner

CONVERTED = "moefy.json"
"""What a model that was converted to experts after its run came to, and how; beside its checkpoint."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network with the state of its strategy; ``clframe.load(run)`` makes one.

    Inputs are what the data set stores, such as bytes; classes are the data set's own ids.
    """

    learner: Learner
    class_order: tuple[int, ...]
    """The data set's id of the class learnt first, second and so on."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def network(self) -> Network:
        """The network, in evaluation mode; its inputs are normalized."""
        return self.learner.network

    def prepare(self, x: Tensor) -> Tensor:
        """Stored inputs as the network wants them."""
        none = torch.zeros(len(x), dtype=torch.long)
        return self.network.place(TensorSamples(x, none, self.mean, self.std).prepare(x))

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Output:
        """What every exit answers: scores_BC in learning order for each."""
        return self.learner.adjust_logits(self.network(self.prepare(x), taps=self.learner.taps))

    def classify(self, x: Tensor) -> Tensor:
        """class_B, the data set's ids, by the strategy's own decision, everything computed."""
        return self.ids(self.learner.predict(self.outputs(x)))

    def ids(self, scores_BC: Tensor) -> Tensor:
        """class_B, the data set's ids, of scores in learning order, such as those of :meth:`dynamic`."""
        return torch.tensor(self.class_order, device=scores_BC.device)[scores_BC.argmax(1)]

    def dynamic(self, *, threshold: float | None = None) -> DynamicNetwork:
        """The network that stops at the first exit that is sure enough and computes no more.

        Args:
            threshold: Largest probability from which on an exit answers; None takes the policy of the
                component ``early_exit``.

        Raises:
            UnsupportedError: No threshold and no such component, or a strategy that corrects answers afterwards.
        """
        for component in self.learner.composition.acting_at("adjust_logits"):
            raise UnsupportedError(
                f"dynamic: '{component.name}' corrects the answers of all exits together; use classify"
            )
        if threshold is not None:
            return DynamicNetwork(self.network, ExitPolicy(thresholds=threshold))
        owner = self.learner.composition.owner("prediction")
        policy = getattr(owner, "policy", None)
        if owner is None or policy is None:
            raise UnsupportedError("dynamic: the strategy has no early_exit; give a threshold")
        return DynamicNetwork(self.network, policy(self.learner.state[owner.name]))


def described(benchmark: Benchmark) -> dict[str, Any]:
    """What a checkpoint keeps of the data, so that a model can be used without them."""
    samples = benchmark.test[0]
    return {
        "input_shape": tuple(benchmark.input_shape),
        "class_order": tuple(benchmark.class_order),
        "mean": tuple(samples.mean),
        "std": tuple(samples.std),
    }


def newest(folder: Path, *, device: torch.device) -> Mapping[str, Any]:
    """The newest checkpoint of a run.

    Raises:
        RunFolderError: There is none, or it cannot be read.
    """
    content = load_latest(folder / "checkpoints", device=device)
    if content is None:
        raise RunFolderError(f"{folder}: has no checkpoint yet; let the run finish an experience")
    return content


def recipe_of(folder: Path) -> Recipe:
    """How the model in a folder was converted to experts.

    Raises:
        RunFolderError: No conversion, or one that cannot be read.
    """
    try:
        tree = json.loads((folder / CONVERTED).read_text(encoding="utf-8"))
        return Recipe.from_tree(tree["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{folder}: holds no {CONVERTED} that can be read; convert the model anew") from None


def restored(
    network: Network, composition: Composition, content: Mapping[str, Any], *, recipe: Recipe | None = None
) -> TrainedModel:
    """The model of a checkpoint.

    Args:
        network: As the config builds it, without exits.
        composition: The strategy.
        content: Of the checkpoint.
        recipe: How the network was converted after its run, if it was.
    """
    learner, data = Learner(network, composition), content["data"]
    if recipe is None:
        network.load_state_dict(content["network"])
        learner.state = decode(content["components"], network)
    else:
        network.grow(content["past"])
        learner.state = decode(content["components"], network)  # frozen copies in it are dense
        recipe.shape(network)
        network.load_state_dict(content["network"])
    network.eval().requires_grad_(False)
    learner.past = tuple(content["past"])
    return TrainedModel(learner, tuple(data["class_order"]), tuple(data["mean"]), tuple(data["std"]))
