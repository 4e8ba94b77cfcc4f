"""Classifiers with outputs that grow with the classes seen.

Shape suffixes: B batch, C classes, F features, P proxies of a class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from math import inf, sqrt
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import DataError, UnsupportedError


def sort_classes(classes: Iterable[int]) -> list[int]:
    """Sort class ids and remove duplicates; a negative id or another value is a :class:`DataError`.

    >>> sort_classes([4, 2, 4])
    [2, 4]
    """
    found = list(classes)
    for one in found:
        if type(one) is not int and (isinstance(one, bool) or not isinstance(one, Integral)):
            raise DataError(f"classes: found {one!r}; give whole numbers from 0")
    wanted = sorted(set(map(int, found)))
    if wanted and wanted[0] < 0:
        raise DataError(f"classes: found class {wanted[0]}; number the classes from 0")
    return wanted


class Head(nn.Module, ABC):
    """A classifier on a tap. It starts without outputs and grows before each experience.

    Attributes:
        cascades: Whether ``forward`` also takes the logits of the previous exit, without their gradient.
    """

    cascades: bool = False

    @abstractmethod
    def grow(self, classes: Iterable[int]) -> bool:
        """Add outputs for ``classes``; True if parameters were replaced. A second call changes nothing."""

    @abstractmethod
    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """Compute logits_BC of a tap; ``previous_BC`` only if the head cascades and an exit precedes it."""

    @property
    def scale(self) -> Tensor | float:
        """The scale of the logits: 1, or eta of a cosine classifier."""
        return 1.0

    def use(self, make: ClassifierKind) -> Head:
        """Return a head like this one whose classifiers are made by ``make``.

        Raises:
            UnsupportedError: A head with classes, or one that cannot change its classifiers.
        """
        raise UnsupportedError(f"{type(self).__name__}: cannot change its classifier; give a head from make_head")

    def fix(self, classes: Iterable[int]) -> None:
        """Freeze the rows of these classes and no others; not part of the state dict.

        Raises:
            UnsupportedError: A head that does not support it.
        """
        raise UnsupportedError(f"{type(self).__name__}: cannot fix classes; give a head from make_head")


class Classifier(Head):
    """A classifier of flat features with one row of weights per class, up to the highest class id seen.

    Growing keeps the old rows bit for bit and draws the new ones as ``nn.Linear`` does, from U(-1/sqrt(F), 1/sqrt(F)),
    on the CPU from torch's global generator: the same seed gives the same weights on every device. Growing, and loading
    a state of another size, replace the parameters, so an optimizer needs the new ones afterwards.

    Where class ids have gaps, an unseen class has a row and a column, and the column is ``-inf``: it receives neither
    probability nor gradient.

    Args:
        features: Width F of the features.
        row: Shape of the weights of one class.

    Attributes:
        seen: seen_C, true for the classes seen.
        fixed: fixed_C, true for the classes whose rows are frozen.
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
        # Python bools, so that forward needs no device synchronization.
        self._gaps = False
        self._any_fixed = False

    @property
    def classes(self) -> int:
        """Number of outputs C: the highest class id seen, plus one."""
        return self.weight.shape[0]

    def grow(self, classes: Iterable[int]) -> bool:
        """Add outputs for ``classes`` and mark them as seen.

        Returns:
            Whether parameters were replaced. A class that fills a gap only loses its mask.

        Raises:
            DataError: A negative class id.
        """
        wanted = sort_classes(classes)
        if not wanted:
            return False
        outputs = max(self.classes, wanted[-1] + 1)
        replaced = outputs != self.classes
        if replaced:
            self._resize(outputs, self._draw_rows)
        self.seen[wanted] = True
        self._gaps = not bool(self.seen.all())
        return replaced

    def use(self, make: ClassifierKind) -> Head:
        """Make a classifier of the same number of features."""
        refuse_after_growth(self.classes)
        return make(self.features)

    def fix(self, classes: Iterable[int]) -> None:
        """Freeze the rows of these classes and no others; not part of the state dict."""
        wanted = [c for c in sort_classes(classes) if c < self.classes]
        self.fixed.zero_()
        self.fixed[wanted] = True
        self._any_fixed = bool(wanted)

    def share(self, other: Classifier) -> None:
        """Share parameters that exist once per exit with another classifier of the same exit; none by default."""

    def detach_fixed(self, values: Tensor) -> Tensor:
        """Detach the fixed rows of a parameter of C rows."""
        if not self._any_fixed:
            return values
        fixed = self.fixed.reshape(-1, *(1,) * (values.dim() - 1))
        return torch.where(fixed, values.detach(), values)

    def mask_unseen(self, logits_BC: Tensor) -> Tensor:
        """Set the logits of unseen classes to ``-inf``."""
        return logits_BC.masked_fill(~self.seen, -inf) if self._gaps else logits_BC

    def extra_repr(self) -> str:
        """Sizes for ``print(head)``."""
        return f"features={self.features}, classes={self.classes}"

    def _draw_rows(self, *shape: int) -> Tensor:
        bound = 1 / sqrt(self.features)
        return torch.empty(shape, dtype=self.weight.dtype, device="cpu").uniform_(-bound, bound)

    @torch.no_grad()
    def _resize(self, outputs: int, fresh: Callable[..., Tensor]) -> None:
        """Truncate to ``outputs`` rows, or append ``fresh`` ones."""
        added = max(outputs - self.classes, 0)
        weight, seen, fixed = self.weight, self.seen, self.fixed
        rows = fresh(added, *weight.shape[1:]).to(weight)
        self.weight = nn.Parameter(torch.cat([weight[:outputs], rows]), requires_grad=weight.requires_grad)
        self.seen = torch.cat([seen[:outputs], seen.new_zeros(added)])
        self.fixed = torch.cat([fixed[:outputs], fixed.new_zeros(added)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Resize to the saved state, then load it as usual."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape[0] != self.classes:
            self._resize(saved.shape[0], torch.zeros)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._gaps = not bool(self.seen.all())


ClassifierKind = Callable[[int], Classifier]
"""Makes a classifier without outputs for a feature width."""


class GrowingLinear(Classifier):
    """Linear classifier ``W x + b``; biases are drawn like the rows, see :class:`Classifier`.

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
        """Compute logits_BC of features_BF, ``-inf`` for unseen classes."""
        return self.mask_unseen(F.linear(features, self.detach_fixed(self.weight), self.detach_fixed(self.bias)))

    @torch.no_grad()
    def _resize(self, outputs: int, fresh: Callable[..., Tensor]) -> None:
        """Resize the rows, then their biases: the order fixes the random draws."""
        added, bias = max(outputs - self.classes, 0), self.bias
        super()._resize(outputs, fresh)
        grown = torch.cat([bias[:outputs], fresh(added).to(bias)])
        self.bias = nn.Parameter(grown, requires_grad=bias.requires_grad)


class CosineLinear(Classifier):
    """Cosine classifier ``eta * cos(w_c, x)`` without bias, so that the norm of a row gives no class an advantage.

    With P > 1 proxies a class has several rows, and its cosine is their mean weighted by their own softmax:
    ``sum_p softmax_p(cos_cp) cos_cp``. Hou et al., "Learning a Unified Classifier Incrementally via
    Rebalancing" (2019); proxies: Douillard et al., "PODNet" (2020), equations 10 and 11.

    Args:
        features: Width F of the features.
        proxies: P, rows per class.
        scale: Initial eta.
        learn_scale: Whether eta is a parameter, shared by all classifiers of an exit.

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
        """Eta, learned or constant."""
        return self.eta

    def share(self, other: Classifier) -> None:
        """Share eta."""
        if isinstance(other, CosineLinear):
            self.eta = other.eta

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """Compute logits_BC of features_BF, ``-inf`` for unseen classes."""
        rows = F.normalize(self.detach_fixed(self.weight), dim=-1)
        cosine_BC = F.linear(F.normalize(features, dim=1), rows.flatten(0, -2))
        if self.proxies > 1:
            cosine_BCP = cosine_BC.unflatten(1, (self.classes, self.proxies))
            cosine_BC = (cosine_BCP.softmax(2) * cosine_BCP).sum(2)
        return self.mask_unseen(self.eta * cosine_BC)


def refuse_after_growth(classes: int) -> None:
    """Refuse to change the classifier of a head with classes (UnsupportedError).

    >>> refuse_after_growth(3)
    Traceback (most recent call last):
    clframe.errors.UnsupportedError: classifiers: found a head with 3 classes; change classifiers before the first
    experience
    """
    if classes:
        raise UnsupportedError(
            f"classifiers: found a head with {classes} classes; change classifiers before the first experience"
        )
