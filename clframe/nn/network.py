"""The interface of exit ensembles, and the default one: each exit for itself.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone, Flow, tap_of
from clframe.nn.heads import Classifier, ClassifierKind, GrowingLinear, Head
from clframe.nn.types import Output

if TYPE_CHECKING:
    from typing_extensions import Self


Carried = tuple[Tensor, ...]
"""What goes from one exit to the next: tensors whose first dimension is the batch."""


class Ensemble(nn.Module, ABC):
    """Turns the logits of exit k, and what the exits before it left, into the scores that exit k answers with."""

    def grow(self, classes: Iterable[int]) -> bool:
        """Make room for ``classes``; True if parameters were replaced."""
        return False

    @abstractmethod
    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """scores_BC of exit ``exit`` (their softmax is its answer's probability), and what to carry on.

        Args:
            exit: Its number k, counted from 0; the backbone's own classifier is the last.
            logits_BC: Its logits.
            carried: What the step of exit k - 1 returned; empty at the first exit.
        """

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """scores_BC of every exit, from the logits of all."""
        scores: list[Tensor] = []
        carried: Carried = ()
        for exit, logits_BC in enumerate(logits):
            scores_BC, carried = self.step(exit, logits_BC, carried)
            scores.append(scores_BC)
        return tuple(scores)


class Single(Ensemble):
    """No ensemble: every exit answers with its own logits."""

    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The logits as they are."""
        return logits_BC, ()


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor`` on its way back.

    >>> x = torch.ones(2, requires_grad=True)
    >>> scale_gradient(x, 0.25).sum().backward()
    >>> x.grad
    tensor([0.2500, 0.2500])
    """
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


Gradient = Literal["through", "detached", "equilibrium"]

FINAL = "final"
"""Name of the last exit, the backbone's own classifier."""


class Network(nn.Module):
    """A backbone and its exits; one forward pass returns the logits of all of them.

    Args:
        backbone: The stages to run.
        exits: ``(tap, head)`` in order of depth, several on one tap if wanted. The backbone's own
            classifier on the last tap always follows them and need not be given.

    Attributes:
        backbone: As given.
        heads: The exits' classifiers in order, the backbone's own last.
        exit_names: The exits' taps, numbered where one has several (``pool``, ``pool#2``); last ``final``.
        exits_at: For each stage, the indices of the heads on its tap.
        ensemble: What each exit answers, given its own logits and earlier ones; each exit for itself at first.
        gradient: How the losses of the exits before the last reach the backbone: ``through``; ``detached``,
            not at all (linear probes); ``equilibrium``, exit k of K scaled by 1/(K - k) and what comes from
            behind it by (K - k - 1)/(K - k), k from 0, so that every exit pulls alike at every depth (Li et
            al., "Improved Techniques for Training Adaptive Deep Networks", 2019).
        extras: What components train beside backbone and heads, by their names: projections, say. No exit uses it.
        boosted: Whether an exit's logits are added to those of the exit before, whose gradient is cut (Yu et
            al., "Boosted Dynamic Neural Networks", 2023).

    Raises:
        UnknownNameError: An exit on a tap that the backbone does not have.
        ConfigError: Exits that are not in order of depth.

    >>> import torch
    >>> from clframe.nn.backbones import mlp
    >>> net = Network(mlp((1, 8, 8), width=16), exits=[("layer1", GrowingLinear(16))])
    >>> net.grow([0, 1, 2])
    True
    >>> out = net(torch.zeros(5, 1, 8, 8), taps=["layer1"])
    >>> [tuple(logits_BC.shape) for logits_BC in out.logits], tuple(out.taps["layer1"].shape)
    ([(5, 3), (5, 3)], (5, 16))
    """

    def __init__(self, backbone: Backbone, *, exits: Sequence[tuple[str, Head]] = ()) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList([GrowingLinear(backbone.features)])
        self.exit_names: tuple[str, ...] = ()
        self.exits_at: tuple[tuple[int, ...], ...] = ()
        self.ensemble: Ensemble = Single()
        self.gradient: Gradient = "through"
        self.boosted = False
        self.extras = nn.ModuleDict()
        self._make_classifier: ClassifierKind | None = None
        self._trunk_frozen = False
        self.attach(exits)

    @property
    def final(self) -> Classifier:
        """The backbone's own classifier."""
        head = self.heads[-1]
        assert isinstance(head, Classifier)
        return head

    @property
    def classes(self) -> int:
        """Number of outputs of the final exit."""
        return self.final.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input sample."""
        return self.backbone.input_shape

    @property
    def exit_taps(self) -> tuple[str, ...]:
        """The tap of each exit, in order."""
        return tuple(name for name, exits in zip(self.backbone.names, self.exits_at, strict=True) for _ in exits)

    def attach(self, exits: Sequence[tuple[str, Head]]) -> None:
        """Put heads on taps, before the backbone's own classifier, which stays as it is.

        Args:
            exits: ``(tap, head)`` in order of depth, several on one tap if wanted; they take the place of
                earlier ones.

        Raises:
            UnknownNameError: A tap that the backbone does not have.
            ConfigError: Exits that are not in order of depth.
        """
        backbone, own = self.backbone, self.final
        stages = [*(backbone.tap(tap) for tap, _ in exits), len(backbone.names) - 1]
        if stages != sorted(stages):
            found = ", ".join(tap for tap, _ in exits)
            raise ConfigError(f"exits: found taps {found}; list them in order of depth")
        make = self._make_classifier
        self.heads = nn.ModuleList([*(head if make is None else head.use(make) for _, head in exits), own])
        self.exit_names = (*_numbered([tap for tap, _ in exits]), FINAL)
        self.exits_at = tuple(
            tuple(exit for exit, at in enumerate(stages) if at == stage) for stage in range(len(backbone.names))
        )

    def classify_with(self, make: ClassifierKind) -> None:
        """Have classifiers of another kind at every exit, those attached later among them.

        Args:
            make: Makes one, without outputs yet, for features of a width, such as
                :class:`~clframe.nn.heads.CosineLinear`.

        Raises:
            UnsupportedError: Classes have been learnt, or a head of a kind that cannot change.
        """
        self.heads = nn.ModuleList(head.use(make) for head in self.heads)  # type: ignore[operator]
        self._make_classifier = make

    def place(self, x: Tensor) -> Tensor:
        """Prepared inputs on the network's device and, where they are floating-point, in the type of its weights."""
        weight = self.final.weight
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    def grow(self, classes: Iterable[int]) -> bool:
        """Grow every head, and the ensemble, for ``classes``; True if parameters were replaced.

        The final exit draws its new rows first: with the same seed it has the same weights whether or
        not there are other exits.
        """
        wanted = tuple(classes)
        grown = [head.grow(wanted) for head in reversed(self.heads)]  # type: ignore[operator]
        return any([*grown, self.ensemble.grow(wanted)])

    def freeze_trunk(self, frozen: Literal["frozen", "free"]) -> None:
        """Hold the backbone and its own classifier still, statistics of batch normalization included, or not."""
        if self._trunk_frozen == (frozen == "frozen"):
            return  # parts that somebody else holds still stay so
        self._trunk_frozen = frozen == "frozen"
        for part in (self.backbone, self.final):
            part.requires_grad_(not self._trunk_frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what may learn: a frozen trunk stays in evaluation mode."""
        super().train(mode)
        if self._trunk_frozen:
            self.backbone.eval()
            self.final.eval()
        return self

    def plan(self) -> tuple[tuple[str, nn.Module, tuple[tuple[str, int], ...]], ...]:
        """The stages in order, each as ``(name, module, ((exit name, exit number), ...))``."""
        return tuple(
            (name, stage, tuple((self.exit_names[i], i) for i in exits))
            for name, stage, exits in zip(
                self.backbone.names, self.backbone.stages, self.exits_at, strict=True
            )
        )

    def classify(self, exit: int, tap: Tensor, previous_BC: Tensor | None) -> Tensor:
        """logits_BC of one exit.

        Args:
            exit: Its number, from 0; the backbone's own classifier is the last.
            tap: The output of its stage.
            previous_BC: Logits of the exit before, None at the first. Cascading heads and boosted exits use
                them, never their gradient.
        """
        head = self.heads[exit]
        if previous_BC is None:
            logits_BC: Tensor = head(tap)
            return logits_BC
        logits_BC = head(tap, previous_BC.detach()) if head.cascades else head(tap)
        return logits_BC + previous_BC.detach() if self.boosted else logits_BC

    def forward(self, x: Tensor, *, taps: Collection[str] = ()) -> Output:
        """Run all stages and classify at every exit.

        Args:
            x: Inputs of shape (B, channels, height, width).
            taps: Names of the stages whose outputs to return as well.

        Raises:
            UnknownNameError: A tap that the backbone does not have.
        """
        backbone = self.backbone
        for name in taps:
            backbone.tap(name)
        logits: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        value: Flow = x
        for name, stage, exits in zip(backbone.names, backbone.stages, self.exits_at, strict=True):
            value = stage(value)
            for exit in exits:
                tap, value = self._branch(exit, value)
                logits.append(self.classify(exit, tap, logits[-1] if logits else None))
            if name in taps:
                kept[name] = tap_of(value)
        return Output(tuple(logits), kept)

    def _branch(self, exit: int, value: Flow) -> tuple[Tensor, Flow]:
        """What the head of ``exit`` sees, and what goes on; they differ in their gradients only."""
        tap = tap_of(value)
        after = len(self.heads) - 1 - exit
        if self.gradient == "through" or not after or not torch.is_grad_enabled():
            return tap, value
        if self.gradient == "detached":
            return tap.detach(), value
        onward = scale_gradient(tap, after / (after + 1))
        return scale_gradient(tap, 1 / (after + 1)), onward if isinstance(value, Tensor) else (onward, *value[1:])


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names made unique: the second of a kind gets ``#2``, and so on."""
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return tuple(name if n == 1 else f"{name}#{n}" for name, n in zip(names, counts, strict=True))
