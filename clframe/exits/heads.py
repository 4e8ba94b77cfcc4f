"""Heads of exits: layers between a tap and its logits, one head for all experiences or one for each.

Shape suffixes: B batch, C classes, N classes met, F features, T heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from clframe.exits.layers import Cascade
from clframe.nn.heads import Classifier, ClassifierKind, GrowingLinear, Head, refuse_after_growth, sort_classes


class ExitHead(Head):
    """Layers followed by one growing linear layer, and optionally a cascade from the previous exit's logits.

    Args:
        layers: From the tap to flat features.
        features: Width of the flat features.
        cascade: Addend from the logits of the previous exit; None ignores them.

    >>> head = ExitHead(nn.Flatten(), features=12)
    >>> head.grow([0, 1, 2]), tuple(head(torch.zeros(5, 3, 2, 2)).shape)
    (True, (5, 3))
    """

    def __init__(self, layers: nn.Module, *, features: int, cascade: Cascade | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.classifier: Classifier = GrowingLinear(features)
        self.cascade = cascade
        self.cascades = cascade is not None

    @property
    def features(self) -> int:
        """Width of the linear layer."""
        return self.classifier.features

    @property
    def classes(self) -> int:
        """Number of outputs: the highest class met, plus one."""
        return self.classifier.classes

    @property
    def scale(self) -> Tensor | float:
        """Scale of its classifier."""
        return self.classifier.scale

    def use(self, make: ClassifierKind) -> ExitHead:
        """Replace the classifier after the layers; returns the head itself."""
        refuse_after_growth(self.classes)
        self.classifier = make(self.features)
        return self

    def fix(self, classes: Iterable[int]) -> None:
        """Block gradients to the rows of these classes, and of no others."""
        self.classifier.fix(classes)

    def grow(self, classes: Iterable[int], *, previous: Iterable[int] | None = None) -> bool:
        """Grow to ``classes``.

        Args:
            classes: Classes of the head.
            previous: Classes of the previous exit that the cascade uses; None means the same as ``classes``.

        Raises:
            DataError: A negative class.
        """
        wanted = tuple(classes)
        grown = self.classifier.grow(wanted)
        if self.cascade is None:
            return grown
        widened = self.cascade.grow(self.classes, inputs=wanted if previous is None else previous)
        return grown or widened

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of a tap, ``-inf`` for classes not met."""
        logits_BC: Tensor = self.classifier(self.layers(features))
        return logits_BC if previous_BC is None else self.cascaded(logits_BC, previous_BC)

    def cascaded(self, logits_BC: Tensor, previous_BC: Tensor) -> Tensor:
        """The logits plus the cascade's addend, if there is a cascade."""
        return logits_BC if self.cascade is None else logits_BC + self.cascade(previous_BC)


class PerExperienceHead(Head):
    """One head for the new classes of each experience; their concatenated logits are those of a single head.

    Column c is class c. Classes that recur keep their head. A class not met has no parameters, and its column is
    ``-inf``. A cascade uses the classes that were known when its head was created.

    A new head is initialized on the CPU from torch's global generator, like the rows of a :class:`Classifier`, and
    takes device, dtype and ``requires_grad`` from the existing heads. Loading a state also creates or removes heads.
    Both replace parameters, so an optimizer must be created afterwards.

    Args:
        common: Layers without parameters between the tap and all heads; they run once.
        make: Creates a head.
        features: Width of the heads' linear layers.
        cascades: Whether the heads use the logits of the previous exit.
        layers: Computes features_TBF of all heads from the output of ``common``, equal to the outputs of each
            head's layers; None calls these one after the other.

    Attributes:
        heads: The heads in the order of their creation.
        head_of: head_C, the index of the head of a class, -1 for classes not met.

    >>> head = PerExperienceHead(nn.Flatten(), lambda: ExitHead(nn.Identity(), features=12), features=12)
    >>> head.grow([0, 1]), head.grow([1, 2]), head.grow([0]), head.head_of.tolist()
    (True, True, False, [0, 0, 1])
    """

    head_of: Tensor
    order: Tensor

    def __init__(
        self,
        common: nn.Module,
        make: Callable[[], ExitHead],
        *,
        features: int,
        cascades: bool = False,
        layers: Callable[[Sequence[nn.Module], Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.common = common
        self.features = features
        self.cascades = cascades
        self.heads = nn.ModuleList()
        self.register_buffer("head_of", torch.empty(0, dtype=torch.long))
        self.register_buffer("order", torch.empty(0, dtype=torch.long), persistent=False)
        self._make = make
        self._layers = layers or _one_by_one
        self._order: list[int] = []  # the classes of all heads, concatenated
        self._in_order = True
        # Carries device, dtype and requires_grad until the first head exists, which then replaces it.
        self.anchor: nn.Parameter | None = nn.Parameter(torch.empty(0))

    @property
    def classes(self) -> int:
        """Number of outputs: the highest class met, plus one."""
        return len(self.head_of)

    @property
    def scale(self) -> Tensor | float:
        """Scale that all classifiers share."""
        first: ExitHead = self.heads[0]  # type: ignore[assignment]
        return first.scale

    def use(self, make: ClassifierKind) -> PerExperienceHead:
        """Set the kind of classifier of future heads; returns the head itself."""
        refuse_after_growth(self.classes)
        self._make = partial(_with_classifier, self._make, make)
        return self

    def fix(self, classes: Iterable[int]) -> None:
        """Block gradients to the rows of these classes, and of no others."""
        wanted, head_of = set(classes), self.head_of.tolist()
        for number, head in enumerate(self.heads):
            own = [c for c in self._order if head_of[c] == number]
            head.fix([row for row, c in enumerate(own) if c in wanted])  # type: ignore[operator]

    def grow(self, classes: Iterable[int]) -> bool:
        """Create a head for those of ``classes`` that are new; True if there are any.

        Raises:
            DataError: A negative class.
        """
        new = [c for c in sort_classes(classes) if c not in self._order]
        if not new:
            return False
        head = self._make_head()
        head.grow(range(len(new)), previous=(*self._order, *new))
        self._add(head)
        head_of = self.head_of.new_full((max(self.classes, new[-1] + 1),), -1)
        head_of[: self.classes] = self.head_of
        head_of[new] = len(self.heads) - 1
        self.head_of = head_of
        self._read_order()
        return True

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of a tap, ``-inf`` for classes not met."""
        if not self.heads:
            return features.new_empty(features.shape[0], 0)
        heads: list[ExitHead] = list(self.heads)  # type: ignore[arg-type]
        features_TBF = self._layers([head.layers for head in heads], self.common(features))
        parts = apply_each_linear([head.classifier for head in heads], features_TBF)
        if previous_BC is not None:
            parts = [head.cascaded(logits_BC, previous_BC) for head, logits_BC in zip(heads, parts, strict=True)]
        logits_BN = torch.cat(parts, 1)
        if self._in_order:
            return logits_BN
        return logits_BN.new_full((logits_BN.shape[0], self.classes), -inf).index_copy(1, self.order, logits_BN)

    def _make_head(self) -> ExitHead:
        with torch.device("cpu"):
            return self._make()

    def _add(self, head: ExitHead) -> None:
        like = self.anchor if self.anchor is not None else next(self.heads.parameters())
        head.to(like).requires_grad_(like.requires_grad).train(self.training)
        if self.heads:
            first: ExitHead = self.heads[0]  # type: ignore[assignment]
            head.classifier.share(first.classifier)
        self.heads.append(head)
        self.anchor = None

    def _read_order(self) -> None:
        """Copy ``head_of`` to the host, so that ``forward`` need not synchronize with the device."""
        head_of = self.head_of.tolist()
        met = [c for c, head in enumerate(head_of) if head >= 0]
        self._order = sorted(met, key=lambda c: (head_of[c], c))
        self._in_order = self._order == list(range(self.classes))
        self.order = torch.tensor(self._order, dtype=torch.long, device=self.head_of.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Create the number of heads of the saved state, then load it."""
        saved = state_dict.get(f"{prefix}head_of")
        if saved is not None:
            self.head_of = self.head_of.new_empty(len(saved))
            self._set_number_of_heads(int(saved.max()) + 1 if len(saved) else 0)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._read_order()

    def _set_number_of_heads(self, count: int) -> None:
        """Create or remove heads without changing torch's global generator; their values are loaded afterwards."""
        with torch.random.fork_rng(devices=[]):
            while len(self.heads) < count:
                self._add(self._make_head())
        if count == 0 and self.anchor is None:
            like = next(self.heads.parameters())
            self.anchor = nn.Parameter(like.new_empty(0), requires_grad=like.requires_grad)
        del self.heads[count:]


def apply_each_linear(classifiers: Sequence[Classifier], features_TBF: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """logits_BC of T classifiers, each on its own features.

    On a CPU they run one after the other, so that a new classifier never changes the rounding of old ones. On
    accelerators, where launching many small products takes longer than running them, :func:`apply_batched_linear` is
    used for linear classifiers without forward hooks, which it would skip.
    """
    linear = [c for c in classifiers if isinstance(c, GrowingLinear) and not c._forward_pre_hooks]
    if features_TBF[0].device.type == "cpu" or len(linear) < len(classifiers):
        return [classifier(x) for classifier, x in zip(classifiers, features_TBF, strict=True)]
    return apply_batched_linear(linear, features_TBF)


def apply_batched_linear(classifiers: Sequence[GrowingLinear], features_TBF: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Equal to :func:`apply_each_linear` up to rounding; adjacent layers of one size run in one batched product."""
    stacked_TBF = features_TBF if isinstance(features_TBF, Tensor) else torch.stack(list(features_TBF))
    groups = [list(group) for _, group in groupby(classifiers, key=lambda classifier: classifier.classes)]
    logits: list[Tensor] = []
    for group, x_TBF in zip(groups, stacked_TBF.split([len(group) for group in groups]), strict=True):
        weight_TCF = torch.stack([classifier.detach_fixed(classifier.weight) for classifier in group])
        bias_TC = torch.stack([classifier.detach_fixed(classifier.bias) for classifier in group])
        logits.extend(torch.baddbmm(bias_TC[:, None], x_TBF, weight_TCF.transpose(1, 2)).unbind())
    return logits


def _with_classifier(make_head: Callable[[], ExitHead], make: ClassifierKind) -> ExitHead:
    return make_head().use(make)


def _one_by_one(layers: Sequence[nn.Module], shared: Any) -> list[Tensor]:
    return [layer(shared) for layer in layers]
