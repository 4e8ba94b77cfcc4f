"""The network: a backbone and its exits.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone
from clframe.nn.backbones.stages import Flow, tap_of
from clframe.nn.exit_ensemble import Ensemble, Single
from clframe.nn.heads import Classifier, ClassifierKind, GrowingLinear, Head
from clframe.nn.token_heads import TokenLinear
from clframe.nn.types import Output
from clframe.options import format_value

if TYPE_CHECKING:
    from typing_extensions import Self


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` and multiply its gradient by ``factor`` in the backward pass.

    >>> x = torch.ones(2, requires_grad=True)
    >>> scale_gradient(x, 0.25).sum().backward()
    >>> x.grad
    tensor([0.2500, 0.2500])
    """
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


Gradient = Literal["through", "detached", "equilibrium"]

StageValues = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""The inputs of the heads of all exits in order, and the requested stage outputs by name."""
StageRunner = Callable[["Network", Tensor, Sequence[str]], StageValues]
"""Computes ``network.run_stages(x, taps)``."""


class Choice(Protocol):
    """Runs a network in evaluation with one of several variants of its weights, such as the adapters of domains."""

    owner: str
    """Name of the component that trains the variants."""
    known: bool
    """Whether evaluations know the domain of a sample, and set it."""
    domain: int | None
    """The domain of the samples, the index of its experience; None if unknown."""

    def __call__(self, network: Network, x: Tensor, taps: Collection[str]) -> Output:
        """Return the output of the chosen variant; the network is in evaluation mode."""

    def of_domain(self, domain: int | None) -> AbstractContextManager[None]:
        """Return a context in which samples are of a domain, or of an unknown one."""

    def best_for(self, network: Network, ids: Sequence[int]) -> AbstractContextManager[None]:
        """Return a context in which the network computes with the variant for a text that begins with ``ids``."""


FINAL = "final"
"""Name of the last exit, the backbone's own classifier."""


class Network(nn.Module):
    """A backbone with exits; one forward pass returns the logits of all exits.

    Args:
        backbone: The stages to run.
        exits: ``(tap, head)`` in order of depth; several may share a tap. The backbone's own classifier on the last
            tap is always added as the last exit.

    Attributes:
        backbone: The backbone.
        heads: The classifiers of the exits in order, the backbone's own last.
        exit_names: The taps of the exits, numbered where a tap has several (``pool``, ``pool#2``) or is called
            ``final``; the last is ``final``.
        exits_at: For each stage, the indices of the heads on its tap.
        ensemble: Combines the logits of an exit with earlier ones; none by default.
        gradient: How gradients of the exits before the last reach the backbone: ``through``, unchanged; ``detached``,
            not at all (linear probes); ``equilibrium``, the gradient of exit k of K scaled by 1/(K - k) and that of
            later exits by (K - k - 1)/(K - k), k from 0, so that every exit contributes equally at every depth (Li et
            al., "Improved Techniques for Training Adaptive Deep Networks", 2019).
        extras: Further modules that components train, by component name, such as projections. Exits do not use them.
        choice: Chooses between variants of the weights in evaluation; None: there is one.
        boosted: Whether the logits of an exit are added to the detached ones of the previous exit (Yu et al., "Boosted
            Dynamic Neural Networks", 2023).

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
        if not isinstance(backbone, Backbone):
            raise ConfigError(f"network: found a {type(backbone).__name__} as backbone; give a Backbone")
        self.backbone = backbone
        make = self._token_classifier if backbone.vocabulary else GrowingLinear
        self.heads = nn.ModuleList([make(backbone.features)])
        self.exit_names: tuple[str, ...] = ()
        self.exits_at: tuple[tuple[int, ...], ...] = ()
        self.ensemble: Ensemble = Single()
        self.gradient: Gradient = "through"
        self.boosted = False
        self.choice: Choice | None = None
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
    def vocabulary(self) -> int:
        """Token ids of a language model, whose logits have one row per token; 0 for a classifier of samples."""
        return self.backbone.vocabulary

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input sample."""
        return self.backbone.input_shape

    @property
    def exit_taps(self) -> tuple[str, ...]:
        """The tap of each exit, in order of depth."""
        return tuple(self.backbone.names[stage] for stage in self.exit_stages)

    @property
    def exit_stages(self) -> tuple[int, ...]:
        """The index of each exit's stage, in order of depth."""
        return tuple(stage for stage, exits in enumerate(self.exits_at) for _ in exits)

    def attach(self, exits: Sequence[tuple[str, Head]]) -> None:
        """Attach heads to taps and replace earlier ones; the backbone's own classifier remains the last exit.

        Args:
            exits: ``(tap, head)`` in order of depth; several may share a tap.

        Raises:
            UnknownNameError: A tap that the backbone does not have.
            ConfigError: Something else than pairs of tap and head, or exits that are not in order of depth.
        """
        _check_exits(exits)
        backbone, own = self.backbone, self.final
        stages = [*(backbone.tap(tap) for tap, _ in exits), len(backbone.names) - 1]
        if stages != sorted(stages):
            found = ", ".join(tap for tap, _ in exits)
            raise ConfigError(f"exits: found taps {found}; list them in order of depth")
        make = self._token_classifier if self.vocabulary else self._make_classifier
        done = [make is None or isinstance(head, TokenLinear) for _, head in exits]
        made = [head if kept else head.use(make) for (_, head), kept in zip(exits, done, strict=True)]  # type: ignore[arg-type]
        self.heads = nn.ModuleList([*made, own])
        self.exit_names = (*_exit_names([tap for tap, _ in exits]), FINAL)
        self.exits_at = tuple(
            tuple(exit for exit, at in enumerate(stages) if at == stage) for stage in range(len(backbone.names))
        )

    def classify_with(self, make: ClassifierKind) -> None:
        """Use classifiers of another kind at every exit, including exits attached later.

        Args:
            make: Makes a classifier without outputs for a feature width, such as
                :class:`~clframe.nn.heads.CosineLinear`.

        Raises:
            UnsupportedError: A network with classes, or a head that cannot change its classifiers.
        """
        self.heads = nn.ModuleList(head.use(make) for head in self.heads)  # type: ignore[operator]
        self._make_classifier = make

    def to_device(self, x: Tensor) -> Tensor:
        """Move inputs to the network's device and cast floating-point ones to the dtype of its weights."""
        weight = self.final.weight
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    def grow(self, classes: Iterable[int]) -> bool:
        """Grow every head, and the ensemble, for ``classes``; True if parameters were replaced.

        The final exit draws its new rows first, so that its weights do not depend on whether there are other exits.
        """
        wanted = tuple(range(self.vocabulary)) or tuple(classes)  # the samples' classes are not those of tokens
        grown = [head.grow(wanted) for head in reversed(self.heads)]  # type: ignore[operator]
        return any([*grown, self.ensemble.grow(wanted)])

    def freeze_trunk(self) -> None:
        """Freeze the backbone and its own classifier, including batch-normalization statistics."""
        self._set_trunk(frozen=True)

    def unfreeze_trunk(self) -> None:
        """Undo :meth:`freeze_trunk`; without it nothing changes, so that other frozen parameters stay frozen."""
        self._set_trunk(frozen=False)

    def _set_trunk(self, *, frozen: bool) -> None:
        if self._trunk_frozen == frozen:
            return
        self._trunk_frozen = frozen
        for part in (self.backbone, self.final):
            part.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for a frozen trunk, which remains in evaluation mode."""
        super().train(mode)
        if self._trunk_frozen:
            self.backbone.eval()
            self.final.eval()
        return self

    def plan(self) -> tuple[tuple[str, nn.Module, tuple[tuple[str, int], ...]], ...]:
        """List the stages in order as ``(name, module, ((exit name, exit index), ...))``."""
        return tuple(
            (name, stage, tuple((self.exit_names[i], i) for i in exits))
            for name, stage, exits in zip(
                self.backbone.names, self.backbone.stages, self.exits_at, strict=True
            )
        )

    def classify(self, exit: int, tap: Tensor, previous_BC: Tensor | None) -> Tensor:
        """Compute logits_BC of one exit.

        Args:
            exit: Its index, from 0; the backbone's own classifier is the last.
            tap: The output of its stage.
            previous_BC: Logits of the previous exit, None at the first; cascading heads and boosted exits use them
                detached.
        """
        head = self.heads[exit]
        if previous_BC is None:
            logits_BC: Tensor = head(tap)
            return logits_BC
        logits_BC = head(tap, previous_BC.detach()) if head.cascades else head(tap)
        return logits_BC + previous_BC.detach() if self.boosted else logits_BC

    def forward(
        self, x: Tensor, *, taps: Collection[str] = (), parts: Sequence[int] = (), stages: StageRunner | None = None
    ) -> Output:
        """Run all stages and classify at every exit.

        Args:
            x: Inputs, batch first.
            taps: Names of the stages whose outputs are returned as well.
            parts: Sizes of the parts of ``x`` to run one after the other, each with its own batch statistics; empty
                runs all samples together.
            stages: Runs all stages, such as a compiled form of :meth:`run_stages`; None runs them one by one, and so do
                evaluations with a ``choice``.

        Raises:
            UnknownNameError: The backbone has no such tap.
        """
        if len(parts) > 1:
            outputs = [self._run(part, taps, stages) for part in x.split(list(parts))]
            logits = tuple(torch.cat(found) for found in zip(*(output.logits for output in outputs), strict=True))
            return Output(logits, {name: torch.cat([output.taps[name] for output in outputs]) for name in taps})
        if self.choice is not None and not self.training:
            return self.choice(self, x, taps)
        return self._run(x, taps, stages)

    def run_once(self, x: Tensor, taps: Collection[str] = ()) -> Output:
        """Run all stages with the weights as they are, without a choice between variants."""
        return self._run(x, taps, None)

    def run_stages(self, x: Tensor, taps: Sequence[str]) -> StageValues:
        """Run all stages without classifying.

        Args:
            x: Inputs, batch first.
            taps: Names of the stages whose outputs are returned as well.
        """
        inputs: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        value: Flow = x
        for name, stage, exits in zip(self.backbone.names, self.backbone.stages, self.exits_at, strict=True):
            value = stage(value)
            for exit in exits:
                tap, value = self._branch(exit, value)
                inputs.append(tap)
            if name in taps:
                kept[name] = tap_of(value)
        return tuple(inputs), kept

    def _run(self, x: Tensor, taps: Collection[str], stages: StageRunner | None) -> Output:
        backbone = self.backbone
        for name in taps:
            backbone.tap(name)
        logits: list[Tensor] = []
        if stages is not None:
            inputs, kept = stages(self, x, tuple(taps))
            for exit, tap in enumerate(inputs):
                logits.append(self.classify(exit, tap, logits[-1] if logits else None))
            return Output(tuple(logits), kept)
        kept = {}
        value: Flow = x
        for name, stage, exits in zip(backbone.names, backbone.stages, self.exits_at, strict=True):
            value = stage(value)
            for exit in exits:
                tap, value = self._branch(exit, value)
                logits.append(self.classify(exit, tap, logits[-1] if logits else None))
            if name in taps:
                kept[name] = tap_of(value)
        return Output(tuple(logits), kept)

    def _token_classifier(self, features: int) -> TokenLinear:
        """Make the classifier of an exit of a language model, tied to the embedding where the widths agree."""
        tied = self.backbone.embedding if features == self.backbone.features else None
        return TokenLinear(features, vocabulary=self.vocabulary, tied=tied)

    def _branch(self, exit: int, value: Flow) -> tuple[Tensor, Flow]:
        """Inputs of the exit's head and of the next stage: the same values with different gradients."""
        tap = tap_of(value)
        after = len(self.heads) - 1 - exit
        if self.gradient == "through" or not after or not torch.is_grad_enabled():
            return tap, value
        if self.gradient == "detached":
            return tap.detach(), value
        onward = scale_gradient(tap, after / (after + 1))
        return scale_gradient(tap, 1 / (after + 1)), onward if isinstance(value, Tensor) else (onward, *value[1:])


def _check_exits(exits: Any) -> None:
    """Refuse something else than pairs of tap and head (ConfigError)."""
    if isinstance(exits, str) or not isinstance(exits, Sequence):
        raise ConfigError(f"exits: found {format_value(exits)}; give a list of (tap, head)")
    for entry in exits:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise ConfigError(f"exits: found {format_value(entry)}; give each exit as (tap, head)")
        if not isinstance(entry[1], Head):
            raise ConfigError(
                f"exits: found a {type(entry[1]).__name__} at tap {entry[0]!r}; give a Head, such as GrowingLinear"
            )


def _exit_names(taps: Sequence[str]) -> tuple[str, ...]:
    """Make names unique: the second exit of a tap gets ``#2``, and so on; one of a layer called ``final``, ``#1``."""
    counts = [taps[: place + 1].count(tap) for place, tap in enumerate(taps)]
    return tuple(tap if n == 1 and tap != FINAL else f"{tap}#{n}" for tap, n in zip(taps, counts, strict=True))
