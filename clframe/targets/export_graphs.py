"""Modules that an export traces: the whole network, and the stages of dynamic inference.

Each is plain tensor arithmetic from stored inputs to probabilities, so that a graph needs neither clframe nor the
strategy. Shape suffixes: B batch, n samples still in the batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter
from clframe.data.inputs import InputFormat
from clframe.errors import UnsupportedError
from clframe.exits.dynamic import DynamicNetwork
from clframe.moe.routed import RoutedExperts, override, routed_layers
from clframe.nn.backbones.stages import tap_of
from clframe.training.trained import TrainedModel

INPUTS = "inputs"
"""Name of the input of an export, and of its first stage."""

DTYPES: Mapping[str, torch.dtype] = {
    "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32,
}  # fmt: skip
"""Types of stored inputs that an export can accept, by name."""


def stored_dtype(trained: TrainedModel) -> str:
    """Name of the type of the inputs as the data set stores them.

    Bytes for images, integers for token ids, and single precision for other arrays, which holds bytes exactly as well.

    Args:
        trained: The model.
    """
    if not trained.std:
        return "int64"
    inputs: InputFormat | None = trained.inputs
    if inputs is not None and inputs.kind == "image":
        return "uint8" if inputs.largest <= 255 else "int32"
    unnormalized = not any(trained.mean) and all(s == 1 for s in trained.std)
    image = len(trained.network.input_shape) == 3
    known = inputs is not None and inputs.kind != "array"
    return "uint8" if image and not unnormalized and not known else "float32"


class Normalize(nn.Module):
    """``(stored - mean) / std`` per channel in float32, as training does it; token ids become int64.

    Args:
        trained: The model whose normalization is used.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (trained.mean, trained.std))
        shape = (-1,) + (1,) * (len(trained.network.input_shape) - 1) if len(trained.mean) > 1 else ()
        self.tokens = not trained.std
        self.dtype = trained.network.final.weight.dtype
        if not self.tokens:
            self.register_buffer("scale", (1 / std).float().reshape(shape))
            self.register_buffer("shift", (-mean / std).float().reshape(shape))

    def forward(self, stored: Tensor) -> Tensor:
        """Inputs of the network."""
        if self.tokens:
            return stored.long()
        return (stored.float() * self.scale + self.shift).to(self.dtype)


class WholeModel(nn.Module):
    """Stored inputs to the probabilities of every exit, the prediction's probabilities, and its class.

    Args:
        trained: The model.
    """

    outputs = ("exit_probabilities", "probabilities", "classes")
    """Names of the outputs: [B, K, C], [B, C] and [B]."""
    class_order: Tensor

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.normalize = Normalize(trained)
        self.network = trained.network
        self.learner = trained.learner
        self.register_buffer("class_order", torch.tensor(trained.class_order))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute all exits, corrected and combined as the strategy does it, and its prediction."""
        output = self.learner.adjust_logits(self.network(self.normalize(inputs), taps=self.learner.taps))
        scores_BC = self.learner.predict(output)
        exits_BKC = torch.stack([_probabilities(logits_BC) for logits_BC in output.logits], 1)
        return exits_BKC, _probabilities(scores_BC), self.class_order[scores_BC.argmax(1)]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Interface of one stage of a staged export."""

    exit: int
    """Index of its exit."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    """MACs of one sample up to and including this stage, with corrections, ensemble and confidence."""
    threshold: float | None
    """Confidence from which its exit stops a sample; None where it cannot."""


class Stage(nn.Module):
    """The part of a network between two exits, with the second exit.

    Inputs and outputs are lists of tensors, each with the batch first, so that a runner drops the rows of samples that
    have stopped without knowing what they mean.

    Args:
        dynamic: The dynamic inference to divide.
        exit: Index of the exit.
        stages: Indices of the stages of the backbone to run before it.
        received: Names of the inputs.
        normalize: Normalization, in the first stage.
    """

    def __init__(
        self, dynamic: DynamicNetwork, exit: int, stages: Sequence[int], *, received: Sequence[str],
        normalize: Normalize | None,
    ) -> None:  # fmt: skip
        super().__init__()
        network = dynamic.network
        last = len(network.heads) - 1
        self.normalize = normalize
        self.stages = nn.ModuleList(network.backbone.stages[index] for index in stages)
        self.head, self.ensemble = network.heads[exit], network.ensemble
        self.measure = dynamic.measure if isinstance(dynamic.measure, nn.Module) else None
        self.received = tuple(received)
        self.sent: tuple[str, ...] = ()
        self.exit, self.last, self.tap = exit, exit == last, network.exit_taps[exit]
        self.chained = exit < last and bool(network.boosted or network.heads[exit + 1].cascades)
        self.has_confidence = exit in dynamic.confidence_exits
        # Not registered: an export of this stage must not contain the weights of the others.
        self._dynamic = [dynamic]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the stages and the exit; returns the tensors named in :attr:`sent`."""
        dynamic = self._dynamic[0]
        network, named = dynamic.network, dict(zip(self.received, values, strict=True))
        flow: Any = self.normalize(named[INPUTS]) if self.normalize is not None else _joined(named, "value")
        for stage in self.stages:
            flow = stage(flow)
        tap = tap_of(flow)
        logits_nC = network.classify(self.exit, tap, named.get("previous"))
        sent = {f"value{k}": part for k, part in enumerate([flow] if isinstance(flow, Tensor) else flow)}
        if self.chained:
            sent["previous"] = logits_nC
        if dynamic.adjust is not None:
            logits_nC = dynamic.adjust(self.exit, logits_nC, {self.tap: tap})
        scores_nC, ensembled = network.ensemble.step(self.exit, logits_nC, _all(named, "ensembled"))
        sent.update({f"ensembled{k}": part for k, part in enumerate(ensembled)})
        found = {"probabilities": _probabilities(scores_nC)}
        if self.has_confidence:
            found["confidence"], measured = dynamic.measure(self.exit, scores_nC, _all(named, "measured"))
            sent.update({f"measured{k}": part for k, part in enumerate(measured)})
        found = found if self.last else {**found, **sent}
        self.sent = tuple(found)
        return tuple(found.values())


def divide(trained: TrainedModel, dynamic: DynamicNetwork, example: Tensor) -> list[tuple[Stage, StageSpec]]:
    """Divide dynamic inference into one stage for each exit that it computes.

    Args:
        trained: The model.
        dynamic: Its dynamic inference, with the exit policy to use.
        example: A batch of stored inputs, run to find out which tensors pass from stage to stage, and what each costs.

    Raises:
        UnsupportedError: No exit before the last is computed.
    """
    network = dynamic.network
    exits = dynamic.computed_exits
    if len(exits) == 1:
        raise UnsupportedError(
            "export: --staged needs exits to stop at and found no exit that stops; give --threshold, or leave --staged "
            "out"
        )
    at = network.exit_stages
    thresholds, stopping = dynamic.policy.of_exits(len(network.heads)), dynamic.stopping_exits
    parts: list[tuple[Stage, StageSpec]] = []
    first, values, macs = 0, {INPUTS: example}, 0
    for exit in exits:
        stage = Stage(
            dynamic, exit, range(first, at[exit] + 1), received=tuple(values),
            normalize=None if parts else Normalize(trained),
        ).eval()  # fmt: skip
        with torch.no_grad():
            found = dict(zip(*_run(stage, values), strict=True))
            with MacCounter() as counter:
                _run(stage, {name: value[:1] for name, value in values.items()})
        macs += counter.macs
        spec = StageSpec(
            exit=exit, inputs=stage.received, outputs=stage.sent, macs=macs,
            # 0 for -inf, which JSON does not have: every confidence is at least 0.
            threshold=max(thresholds[exit], 0.0) if exit in stopping else None,
        )  # fmt: skip
        parts.append((stage, spec))
        values = {name: value for name, value in found.items() if name not in ("probabilities", "confidence")}
        first = at[exit] + 1
    return parts


@contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Context in which experts are computed densely and masked: a graph has no branches that depend on the routing."""
    layers = routed_layers(network)
    experts = [layer.experts for layer in layers.values()]
    before = [each.executor for each in experts]
    try:
        with override(layers, "ran", _nothing), override(layers, "chosen", _nothing):
            for each in experts:
                each.executor = "dense"
                # The cache of views compares addresses, which tensors under tracing do not have.
                object.__setattr__(each, "weights", each._all_weights)
            yield
    finally:
        for each, executor in zip(experts, before, strict=True):
            each.executor = executor
            each.__dict__.pop("weights", None)


def has_experts(network: nn.Module) -> bool:
    """Whether the network has routed experts."""
    return any(isinstance(part, RoutedExperts) for part in network.modules())


def _nothing(name: str) -> None:
    return None


def _run(stage: Stage, values: Mapping[str, Tensor]) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    found = stage(*values.values())
    return stage.sent, found


def _probabilities(scores_BC: Tensor) -> Tensor:
    return scores_BC.float().softmax(1)


def _all(named: Mapping[str, Tensor], kind: str) -> tuple[Tensor, ...]:
    return tuple(value for name, value in named.items() if name.startswith(kind))


def _joined(named: Mapping[str, Tensor], kind: str) -> Tensor | tuple[Tensor, ...]:
    """A stage's output of its parts: the tap alone, or a tuple."""
    found = _all(named, kind)
    return found[0] if len(found) == 1 else found
