"""Trained models: prediction with the network and the strategy state of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from clframe.core import Composition
from clframe.data.benchmark import Benchmark
from clframe.data.chain import Stored
from clframe.data.digests import StreamDigest
from clframe.data.inputs import InputFormat
from clframe.data.numeric import numeric_tensor
from clframe.data.samples import TensorSamples
from clframe.errors import DataError, RunFolderError, UnsupportedError
from clframe.exits import ExitPolicy
from clframe.exits.curves import BudgetPoints
from clframe.exits.diagnostics import ExitRecord
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import probability_threshold
from clframe.files import read_json
from clframe.moe.pipeline import Recipe
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.checkpoint import decode, load_latest
from clframe.training.learner import Learner
from clframe.training.recorded_data import check_classes, check_data, check_states

PREDICTING = ("adjust_logits", "adjust_exit_logits", "predict")
"""Hooks of components that change predictions."""

CONVERTED = "moefy.json"
"""Results and options of a conversion to experts after training; in the same folder as the converted checkpoint."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network with the state of its strategy, as returned by ``clframe.load(run)``.

    Inputs are tensors or arrays as the data set stores them, such as bytes; predicted classes are the data set's ids.
    Parameters are frozen: to learn more, extend the run (``clframe.load(run).extend``).
    """

    learner: Learner
    class_order: tuple[int, ...]
    """The data set's ids of the classes in the order in which they were learned."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    """Name of each class, by its id in the data set; empty if unknown."""
    inputs: InputFormat | None = None
    """Conversion of files to inputs; None where the checkpoint does not record it."""
    budgets: BudgetPoints | None = None
    """Thresholds for budgets, chosen on validation data after the last experience; None where none are recorded."""
    digest: StreamDigest | None = None
    """Identity of the samples of its run; None where the checkpoint does not record it."""

    @property
    def network(self) -> Network:
        """The network in evaluation mode; it expects normalized inputs, see :meth:`prepare`."""
        return self.learner.network

    def prepare(self, x: Tensor | ArrayLike) -> Tensor:
        """Normalize stored inputs and move them to the network's device.

        Args:
            x: A batch or a single sample. Images may have the channels last, and gray ones no channel at all.

        Raises:
            DataError: Inputs of another shape than the network was trained on, that are not finite or not numbers, or
                values that no stored image has, such as fractions for bytes.
        """
        batch = self.as_batch(numeric_tensor(x, where="classify"))
        samples = TensorSamples(batch, torch.zeros(len(batch), dtype=torch.long), self.mean, self.std)
        (self.inputs or InputFormat()).check_pixels(batch, where="classify")
        return self.network.to_device(samples.prepare(batch))

    @torch.no_grad()
    def outputs(self, x: Tensor | ArrayLike) -> Output:
        """Scores of every exit, scores_BC in learning order, corrected and combined by the ensemble."""
        return self.learner.adjust_logits(self.network(self.prepare(x), taps=self.learner.taps))

    def classify(self, x: Tensor | ArrayLike) -> Tensor:
        """class_B, the data set's ids, by the strategy's prediction rule; all exits computed.

        Accepts what :meth:`prepare` does; a single sample gives one class.
        """
        return self.ids(self.learner.predict(self.outputs(x)))

    def ids(self, scores_BC: Tensor) -> Tensor:
        """class_B, the data set's ids, of scores in learning order, such as those of :meth:`dynamic`."""
        return torch.tensor(self.class_order, device=scores_BC.device)[scores_BC.argmax(1)]

    def dynamic(
        self, *, threshold: float | None = None, exits: Sequence[int | str] | None = None
    ) -> DynamicNetwork:
        """The network with dynamic inference: each sample stops at the first exit that the policy selects.

        Corrections of the strategy (bias correction, nearest class means) are applied exit by exit, so predictions
        equal those of :meth:`classify` under the same policy.

        Args:
            threshold: Largest probability from which an exit predicts, from 0 to 1, or infinity: none does before the
                last; None uses the policy of the component ``early_exit``.
            exits: Indices or names of the exits that may stop a sample before the last; all if not given. The others
                are not computed unless one of these needs them.

        Raises:
            ConfigError, UnknownNameError: Another threshold, or exits that the network does not have.
            UnsupportedError: No threshold and no such component, a rule that uses all exits, or a strategy that
                corrects the logits of all exits together.
        """
        adjust = self.learner.exit_corrector()
        if threshold is not None:
            policy = ExitPolicy(thresholds=probability_threshold(threshold, where="dynamic: threshold"))
            return DynamicNetwork(self.network, policy, exits=exits, adjust=adjust)
        owner = self.learner.composition.owner("prediction")
        make = getattr(owner, "policy", None)
        if owner is None or make is None:
            raise UnsupportedError("dynamic: the strategy has no early_exit; give a threshold")
        rule = getattr(owner, "rule", "first")
        if rule != "first":
            raise UnsupportedError(f"dynamic: rule '{rule}' uses all exits; give a threshold, or use classify")
        return DynamicNetwork(self.network, make(self.learner.state[owner.name]), exits=exits, adjust=adjust)

    def as_batch(self, x: Tensor, *, where: str = "classify") -> Tensor:
        """Stored inputs with a batch dimension, images with the channels first.

        Raises:
            DataError: Inputs of another shape; the message begins with ``where``.
        """
        shape = self.network.input_shape
        if not self.std:  # token ids: sequences may have any length
            return x[None] if x.ndim == len(shape) else x
        if len(shape) == 3:
            channels, *size = shape
            if channels == 1 and [*x.shape[-2:]] == size and (x.ndim == 2 or (x.ndim == 3 and len(x) > 1)):
                x = x.unsqueeze(-3)
            elif x.ndim in (3, 4) and [*x.shape[-3:]] == [*size, channels] and tuple(x.shape[-3:]) != tuple(shape):
                x = x.movedim(-1, -3)
        if tuple(x.shape) == tuple(shape):
            return x[None]
        if tuple(x.shape[1:]) != tuple(shape):
            raise DataError(
                f"{where}: found inputs of shape {tuple(x.shape)}; give a batch (N, {', '.join(map(str, shape))}) or "
                f"one sample {tuple(shape)}, with values as the data set stores them"
            )
        return x


def describe_data(benchmark: Benchmark, *, recorded: StreamDigest | None = None) -> dict[str, Any]:
    """Properties of the data that a checkpoint stores, so that a model can be used without the data.

    Args:
        benchmark: The data.
        recorded: What the run has recorded of earlier data, which may be gone.
    """
    samples = benchmark.test[0]
    return {
        "input_shape": tuple(benchmark.input_shape),
        "class_order": tuple(benchmark.class_order),
        "mean": tuple(samples.mean),
        "std": tuple(samples.std),
        "class_names": tuple(benchmark.class_names),
        "inputs": benchmark.inputs.as_tree(),
        "dtype": Stored.of(benchmark).dtype,
        "digest": benchmark.digest.fill_from(recorded).as_tree(),
    }


def recorded_digest(content: Mapping[str, Any]) -> StreamDigest | None:
    """Return the identity of a run's samples, as a checkpoint stores it; None in those of earlier versions.

    Raises:
        RunFolderError: Another content.
    """
    data = content.get("data")
    tree = data.get("digest") if isinstance(data, Mapping) else None
    return None if tree is None else StreamDigest.of(tree, where="checkpoint")


def load_newest(folder: Path, *, device: torch.device) -> Mapping[str, Any]:
    """Load the newest checkpoint of a run.

    Raises:
        RunFolderError: There is none, or it cannot be read.
    """
    content = load_latest(folder / "checkpoints", device=device)
    if content is None:
        raise RunFolderError(f"{folder}: has no checkpoint yet; run it until an experience is finished")
    return content


def read_recipe(folder: Path) -> Recipe:
    """Read the options with which the model in a folder was converted to experts.

    Raises:
        RunFolderError: No conversion, or one that cannot be read.
    """
    try:
        tree = read_json(folder / CONVERTED)
        return Recipe.from_tree(tree["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{folder}: found no readable {CONVERTED}; convert the model again") from None


def predicting_components(composition: Composition) -> frozenset[str]:
    """Names of the components that change predictions."""
    return frozenset(component.name for hook in PREDICTING for component in composition.acting_at(hook))


def restore_model(
    network: Network, composition: Composition, content: Mapping[str, Any], *, recipe: Recipe | None = None
) -> TrainedModel:
    """Restore the model of a checkpoint.

    Args:
        network: A new network as the config builds it, without exits.
        composition: The strategy.
        content: Content of the checkpoint.
        recipe: Options of its conversion to experts after training, if it was converted.

    Raises:
        RuntimeError, ValueError, LookupError, TypeError, AttributeError: A content that does not fit, or that
            :func:`~clframe.training.recorded_data.check_data` refuses.
    """
    learner, data = Learner(network, composition), content["data"]
    check_data(data)
    check_states(content["components"], needed=predicting_components(composition))
    if recipe is None:
        network.load_state_dict(content["network"])
        learner.state = {**learner.state, **decode(content["components"], network)}
    else:
        network.grow(content["past"])
        # Before the conversion: frozen copies in it are dense.
        learner.state = {**learner.state, **decode(content["components"], network)}
        recipe.shape(network)
        network.load_state_dict(content["network"])
    network.eval().requires_grad_(False)
    learner.past = tuple(content["past"])
    check_classes(data, learner.past, outputs=len(data["class_order"]) if network.vocabulary else network.classes)
    return TrainedModel(
        learner,
        tuple(data["class_order"]),
        tuple(data["mean"]),
        tuple(data["std"]),
        class_names=tuple(data.get("class_names", ())),
        inputs=InputFormat.of(data["inputs"]) if "inputs" in data else None,
        # A conversion to experts changes confidences: thresholds of the dense model do not apply to it.
        budgets=_recorded_budgets(content) if recipe is None else None,
        digest=recorded_digest(content),
    )


def _recorded_budgets(content: Mapping[str, Any]) -> BudgetPoints | None:
    try:
        return ExitRecord.of(content["exits"][-1]).points
    except (LookupError, RunFolderError):  # an older checkpoint: models load without
        return None
