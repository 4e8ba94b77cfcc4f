"""The network: a backbone with classifiers on its taps.

A plain network is a network with one exit, its own classifier on the last tap; the same code serves both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from clframe.core.types import Output
from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone
from clframe.nn.heads import GrowingLinear, Head

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
        own = GrowingLinear(backbone.features)
        stages = [*(backbone.tap(tap) for tap, _ in exits), len(backbone.names) - 1]
        if stages != sorted(stages):
            found = ", ".join(tap for tap, _ in exits)
            raise ConfigError(f"exits: found taps {found}; list them in order of depth")
        self.backbone = backbone
        self.heads = nn.ModuleList([*(head for _, head in exits), own])
        self.exit_names: tuple[str, ...] = (*_numbered([tap for tap, _ in exits]), FINAL)
        self.exits_at: tuple[tuple[int, ...], ...] = tuple(
            tuple(exit for exit, at in enumerate(stages) if at == stage)
            for stage in range(len(backbone.names))
        )

    @property
    def final(self) -> GrowingLinear:
        """The backbone's own classifier."""
        head = self.heads[-1]
        assert isinstance(head, GrowingLinear)
        return head

    @property
    def classes(self) -> int:
        """Number of outputs of the final exit."""
        return self.final.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input sample."""
        return self.backbone.input_shape

    def grow(self, classes: Iterable[int]) -> bool:
        """Grow every head for ``classes``; True if parameters were replaced.

        The final exit draws its new rows first: with the same seed it has the same weights whether or
        not there are other exits.
        """
        wanted = tuple(classes)
        return any([head.grow(wanted) for head in reversed(self.heads)])  # type: ignore[operator]

    def plan(self) -> tuple[tuple[str, nn.Module, tuple[tuple[str, nn.Module], ...]], ...]:
        """The stages in order, each as ``(name, module, ((exit name, head), ...))``."""
        return tuple(
            (name, stage, tuple((self.exit_names[i], self.heads[i]) for i in exits))
            for name, stage, exits in zip(
                self.backbone.names, self.backbone.stages, self.exits_at, strict=True
            )
        )

    def forward(self, x: Tensor, *, taps: Collection[str] = ()) -> Output:
        """Run all stages and classify at every exit.

        Args:
            x: Inputs of shape (B, channels, height, width).
            taps: Names of the stages whose outputs to return as well.

        Raises:
            UnknownNameError: A tap that the backbone does not have.
        """
        for name in taps:
            self.backbone.tap(name)
        logits: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        heads = self.heads
        for name, stage, exits in zip(self.backbone.names, self.backbone.stages, self.exits_at, strict=True):
            x = stage(x)
            for index in exits:
                logits.append(heads[index](x))
            if name in taps:
                kept[name] = x
        return Output(tuple(logits), kept)


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names made unique: the second of a kind gets ``#2``, and so on."""
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return tuple(name if n == 1 else f"{name}#{n}" for name, n in zip(names, counts, strict=True))
