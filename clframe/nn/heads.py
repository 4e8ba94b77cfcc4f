"""Classifiers whose outputs grow with the classes met.

Shape suffixes: B batch, C classes, F features, P proxies of a class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import DataError, UnsupportedError


def ordered(classes: Iterable[int]) -> list[int]:
    """The classes in ascending order, each once; raises :class:`DataError` for a negative one.

    >>> ordered([4, 2, 4])
    [2, 4]
    """
    wanted = sorted(set(classes))
    if wanted and wanted[0] < 0:
        raise DataError(f"classes: found class {wanted[0]}; number the classes from 0")
    return wanted


class Head(nn.Module, ABC):
    """A classifier on a tap. It starts without outputs and grows before each experience.

    Attributes:
        cascades: Whether ``forward`` also takes the logits of the exit before, without their gradient.
    """

    cascades: bool = False

    @abstractmethod
    def grow(self, classes: Iterable[int]) -> bool:
        """Make room for ``classes``; True if parameters were replaced. A second call changes nothing."""

    @abstractmethod
    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of a tap's output; ``previous_BC`` only where the head cascades and an exit precedes it."""

    @property
    def scale(self) -> Tensor | float:
        """What its logits are a multiple of: 1, or the scale of a cosine classifier."""
        return 1.0

    def use(self, make: ClassifierKind) -> Head:
        """The head to put in this one's place so that its classifiers are those that ``make`` makes.

        Raises:
            UnsupportedError: A head that has classes already, or cannot change its classifiers.
        """
        raise UnsupportedError(f"{type(self).__name__}: cannot change its classifier; give a head of make_head")

    def fix(self, classes: Iterable[int]) -> None:
        """Let no gradient reach the rows of these classes, and of these alone; a state does not keep it.

        Raises:
            UnsupportedError: A head that cannot.
        """
        raise UnsupportedError(f"{type(self).__name__}: cannot hold classes fixed; give a head of make_head")


class Classifier(Head):
    """A classifier of flat features: a row of weights for each class up to the highest one met.

    Growing keeps the old rows bit for bit and draws the new ones as ``nn.Linear`` does, from
    U(-1/sqrt(F), 1/sqrt(F)), on the CPU from torch's global generator: the same seed gives the same weights
    on every device. Parameters are replaced by growing and by loading a state of another size, so an
    optimizer must be told of them afterwards.

    Where class numbers have gaps, a class not met has a row and a column, and the column is ``-inf``: it
    never receives probability, and its row never a gradient.

    Args:
        features: Width F of the features.
        row: Shape of the weights of one class.

    Attributes:
        seen: seen_C, true for the classes met.
        fixed: fixed_C, true for the classes whose rows no gradient reaches.
    """

    weight: nn.Parameter
    seen: Tensor
    fixed: Tensor

    def __init__(self, features: int, *, row: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.empty(0, *row))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("fixed", torch.zeros(0, dtype=torch.bool), persistent=False)
        # Plain bools, so that forward need not ask the device.
        self._gaps = False
        self._any_fixed = False

    @property
    def classes(self) -> int:
        """Number of outputs C: the highest class met, plus one."""
        return self.weight.shape[0]

    def grow(self, classes: Iterable[int]) -> bool:
        """Make room for ``classes`` and mark them as met.

        Returns:
            Whether parameters are new ones now. Meeting a class that fills a gap only lifts its mask.

        Raises:
            DataError: A negative class.
        """
        wanted = ordered(classes)
        if not wanted:
            return False
        outputs = max(self.classes, wanted[-1] + 1)
        replaced = outputs != self.classes
        if replaced:
            self._resize(outputs, self._drawn)
        self.seen[wanted] = True
        self._gaps = not bool(self.seen.all())
        return replaced

    def use(self, make: ClassifierKind) -> Head:
        """Another classifier of as many features."""
        refuse_learnt(self.classes)
        return make(self.features)

    def fix(self, classes: Iterable[int]) -> None:
        """Let no gradient reach the rows of these classes, and of these alone; a state does not keep it."""
        wanted = [c for c in ordered(classes) if c < self.classes]
        self.fixed.zero_()
        self.fixed[wanted] = True
        self._any_fixed = bool(wanted)

    def share(self, other: Classifier) -> None:
        """Have in common with a classifier of the same exit what there is one of at an exit; nothing by default."""

    def learning(self, values: Tensor) -> Tensor:
        """A parameter of C rows, the fixed ones without gradient."""
        if not self._any_fixed:
            return values
        fixed = self.fixed.reshape(-1, *(1,) * (values.dim() - 1))
        return torch.where(fixed, values.detach(), values)

    def masked(self, logits_BC: Tensor) -> Tensor:
        """The logits, ``-inf`` for classes not met."""
        return logits_BC.masked_fill(~self.seen, -inf) if self._gaps else logits_BC

    def extra_repr(self) -> str:
        """Sizes, as ``print(head)`` shows them."""
        return f"features={self.features}, classes={self.classes}"

    def _drawn(self, *shape: int) -> Tensor:
        bound = 1 / sqrt(self.features)
        return torch.empty(shape, dtype=self.weight.dtype, device="cpu").uniform_(-bound, bound)

    @torch.no_grad()
    def _resize(self, outputs: int, fresh: Callable[..., Tensor]) -> None:
        """Keep the first rows, as many as fit, and put fresh ones behind them."""
        added = max(outputs - self.classes, 0)
        weight, seen, fixed = self.weight, self.seen, self.fixed
        rows = fresh(added, *weight.shape[1:]).to(weight)
        self.weight = nn.Parameter(torch.cat([weight[:outputs], rows]), requires_grad=weight.requires_grad)
        self.seen = torch.cat([seen[:outputs], seen.new_zeros(added)])
        self.fixed = torch.cat([fixed[:outputs], fixed.new_zeros(added)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the size of the saved state first, then load it as any module does."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape[0] != self.classes:
            self._resize(saved.shape[0], torch.zeros)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._gaps = not bool(self.seen.all())


ClassifierKind = Callable[[int], Classifier]
"""Makes a classifier, without outputs yet, for features of a width."""


class GrowingLinear(Classifier):
    """Linear classifier: ``W x + b``, biases drawn as the rows are; see :class:`Classifier` for how it grows.

    Args:
        features: Width F of the features.

    >>> head = GrowingLinear(8)
    >>> head.grow([0, 1]), head.grow([0, 1]), head.classes
    (True, False, 2)
    """

    bias: nn.Parameter

    def __init__(self, features: int) -> None:
        super().__init__(features, row=(features,))
        self.bias = nn.Parameter(torch.empty(0))

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of features_BF, ``-inf`` for classes not met."""
        return self.masked(F.linear(features, self.learning(self.weight), self.learning(self.bias)))

    @torch.no_grad()
    def _resize(self, outputs: int, fresh: Callable[..., Tensor]) -> None:
        """Rows first, then their biases."""
        added, bias = max(outputs - self.classes, 0), self.bias
        super()._resize(outputs, fresh)
        grown = torch.cat([bias[:outputs], fresh(added).to(bias)])
        self.bias = nn.Parameter(grown, requires_grad=bias.requires_grad)


class CosineLinear(Classifier):
    """Cosine classifier: ``eta * cos(w_c, x)``, no bias, so that no class gains by the length of its row.

    With P > 1 proxies a class has several rows, and its cosine is their mean, weighted by a softmax over
    themselves: ``sum_p softmax_p(cos_cp) cos_cp``. Hou et al., "Learning a Unified Classifier Incrementally via
    Rebalancing" (2019); proxies: Douillard et al., "PODNet" (2020), equations 10 and 11.

    Args:
        features: Width F of the features.
        proxies: P, the rows of each class.
        scale: eta, at first.
        learn_scale: Whether eta is a parameter, one for all classifiers of an exit.

    >>> head = CosineLinear(2, scale=10.0)
    >>> head.grow([0]), round(head(3 * head.weight.detach()).item(), 4)
    (True, 10.0)
    """

    eta: Tensor

    def __init__(self, features: int, *, proxies: int = 1, scale: float = 1.0, learn_scale: bool = True) -> None:
        super().__init__(features, row=(features,) if proxies == 1 else (proxies, features))
        self.proxies = proxies
        if learn_scale:
            self.eta = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("eta", torch.tensor(float(scale)))

    @property
    def scale(self) -> Tensor:
        """The learnable, or given, eta."""
        return self.eta

    def share(self, other: Classifier) -> None:
        """One eta for both."""
        if isinstance(other, CosineLinear):
            self.eta = other.eta

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of features_BF, ``-inf`` for classes not met."""
        rows = F.normalize(self.learning(self.weight), dim=-1)
        cosine_BC = F.linear(F.normalize(features, dim=1), rows.flatten(0, -2))
        if self.proxies > 1:
            cosine_BCP = cosine_BC.unflatten(1, (self.classes, self.proxies))
            cosine_BC = (cosine_BCP.softmax(2) * cosine_BCP).sum(2)
        return self.masked(self.eta * cosine_BC)


def refuse_learnt(classes: int) -> None:
    """Refuse to change the classifier of a head that has classes (UnsupportedError).

    >>> refuse_learnt(3)
    Traceback (most recent call last):
    clframe.errors.UnsupportedError: classifiers: found 3 classes learnt; change the classifiers before there are any
    """
    if classes:
        raise UnsupportedError(
            f"classifiers: found {classes} classes learnt; change the classifiers before there are any"
        )
