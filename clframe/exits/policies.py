"""Confidence measures, exit policies, and the registry through which packages add measures.

An exit policy is a confidence measure and thresholds: a sample stops at the first exit whose confidence reaches its
threshold. A measure of another package is one function in one file::

    from torch import Tensor
    from clframe.exits import Carried, register_confidence

    @register_confidence("top_two_ratio")
    def top_two_ratio(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        first_B, second_B = scores_BC.softmax(1).topk(2, dim=1).values.unbind(1)
        return 1 - second_B / first_B, ()

``strategy="exits + early_exit(measure='top_two_ratio', budget=0.5)"`` then trains, solves thresholds, evaluates and
skips computation with it. A package that is installed needs no import: it declares the entry point
``top_two_ratio = "my_package:top_two_ratio"`` in the group ``clframe.exit_policies``. A measure with parameters that
are fitted on held-out data is a subclass of :class:`FittedConfidence`, registered the same way.

Shape suffixes: B batch, C classes, K exits, N samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint
from math import inf, isnan
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from clframe.errors import ConfigError
from clframe.nn.exit_ensemble import Carried
from clframe.options import format_value, require_count
from clframe.registry import Registry, call_problem

if TYPE_CHECKING:
    from typing_extensions import Self

ConfidenceMeasure = Callable[[int, Tensor, Carried], tuple[Tensor, Carried]]
"""``(exit, scores_BC, carried) -> (confidence_B, carried)``.

``exit`` counts from 0. ``scores_BC`` are the exit's logits after corrections and its ensemble; classes not met have
``-inf``. ``confidence_B`` grows with certainty and is between 0 and 1 (a threshold above 1 never fires); NaN reaches
no threshold. ``carried`` is what the call at the previous exit returned, a tuple of tensors with the batch first,
empty at the first exit: finished samples are removed from it. Exits whose threshold cannot fire are skipped, unless the
measure carries values and a later exit can, see :meth:`ExitPolicy.confidence_exits`. Measures must treat samples
independently of each other.
"""

Fallback = Literal["last", "confident"]
"""Prediction where no exit before the last reaches its threshold: the last exit's, or that of the most confident."""


class FittedConfidence(nn.Module, ABC):
    """Base class of confidence measures with parameters, fitted on held-out data after each experience.

    All parameters are in ``state_dict``, which the checkpoint stores; ``cls(exits)`` followed by ``load_state_dict``
    restores the measure.

    Args:
        exits: Number of exits K, the last included.
    """

    overfits: ClassVar[bool] = False
    """Whether the measure has so many parameters that thresholds are solved on out-of-fold confidences."""

    def __init__(self, exits: int) -> None:
        super().__init__()
        self.exits = exits

    @classmethod
    @abstractmethod
    def fit(cls, scores: Sequence[Tensor], targets_N: Tensor) -> Self:
        """Fit on K tensors scores_NC of held-out samples and their classes.

        Raises:
            DataError: No samples.
        """

    @abstractmethod
    def forward(self, exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Confidence of one exit; see :data:`ConfidenceMeasure`."""


def _load_measure(point: EntryPoint) -> Iterator[tuple[str, ConfidenceMeasure | type[FittedConfidence]]]:
    yield point.name, point.load()


_EXPECTED = "a function (exit, scores_BC, carried) -> (confidence_B, carried), or a subclass of FittedConfidence"


def _problem(entry: Any) -> str:
    """Return why ``entry`` cannot be a confidence measure, or an empty text."""
    measure = ("exit", "scores_BC", "carried")
    if not isinstance(entry, type):
        return call_problem(entry, measure, expected=_EXPECTED, options=False)
    if not issubclass(entry, FittedConfidence):
        return f"found the class {entry.__name__}; expected {_EXPECTED}"
    if entry.__abstractmethods__:
        return f"{entry.__name__} does not define {', '.join(sorted(entry.__abstractmethods__))}; add it"
    forward = "forward(self, exit, scores_BC, carried)"
    wrong = (
        call_problem(entry, ("exits",), expected=f"{entry.__name__}(exits)", options=False)
        or call_problem(entry.forward, ("self", *measure), expected=forward, options=False)
        or call_problem(entry.fit, ("scores", "targets_N"), expected="a class method fit(cls, scores, targets_N)",
                        options=False)
    )  # fmt: skip
    return wrong


CONFIDENCE_MEASURES: Registry[ConfidenceMeasure | type[FittedConfidence]] = Registry(
    "confidence measure", group="clframe.exit_policies", load=_load_measure, problem=_problem
)
"""Every confidence measure by name, also those of packages with an entry point in ``clframe.exit_policies``."""

M = TypeVar("M", bound=Callable[..., Any])


def register_confidence(name: str) -> Callable[[M], M]:
    """Decorator that makes a measure available under a name: ``@register_confidence("mine")``.

    Raises:
        ConfigError: Something else than a function with the arguments of :data:`ConfidenceMeasure`, or than a complete
            subclass of :class:`FittedConfidence`.
    """

    def decorate(entry: M) -> M:
        CONFIDENCE_MEASURES.add(name, entry)
        return entry

    return decorate


@register_confidence("max_probability")
def max_probability(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Largest class probability (Kaya et al., "Shallow-Deep Networks", 2019).

    >>> max_probability(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0.5000, 1.0000])
    """
    return _probabilities(scores_BC).amax(1), ()


@register_confidence("entropy")
def entropy(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """``1 - H(p) / log C`` with C the classes met so far (Teerapittayanon et al., "BranchyNet", 2016).

    >>> entropy(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0., 1.])
    """
    met_B = scores_BC.isneginf().logical_not_().sum(1).clamp_(min=2)  # with one class H is 0 and log C would be 0 too
    entropy_B = torch.special.entr(_probabilities(scores_BC)).sum(1)
    return (1 - entropy_B / met_B.log()).clamp_(0, 1), ()


@register_confidence("margin")
def margin(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Difference between the two largest class probabilities; 1 with a single class.

    >>> margin(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0., 1.])
    """
    top = _probabilities(scores_BC).topk(min(2, scores_BC.shape[1]), dim=1).values
    return (top[:, 0] - top[:, 1] if top.shape[1] > 1 else top[:, 0]), ()


@register_confidence("patience")
def patience(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """``(n - 1) / n`` with n the number of consecutive exits, up to this one, that predict the same class.

    Requiring p exits to agree with the previous one (Zhou et al., "BERT loses patience", 2020) is the threshold
    ``p / (p + 1)``, see :func:`patience_threshold`. The value is always below 1.

    >>> first, carried = patience(0, torch.tensor([[2.0, 1.0], [2.0, 1.0]]), ())
    >>> first, patience(1, torch.tensor([[2.0, 1.0], [1.0, 2.0]]), carried)[0]
    (tensor([0., 0.]), tensor([0.5000, 0.0000]))
    """
    class_B = scores_BC.argmax(1)
    run_B = torch.ones_like(class_B)
    if carried:
        before_B, length_B = carried
        run_B += length_B * (class_B == before_B)
    return (run_B - 1).float() / run_B, (class_B, run_B)


def probability_threshold(threshold: Any, *, where: str) -> float:
    """Return a threshold of :func:`max_probability`: from 0 to 1, or infinity, at which no exit stops a sample.

    Raises:
        ConfigError: Another number, or none; the message begins with ``where``.

    >>> probability_threshold(5, where="--threshold")
    Traceback (most recent call last):
    clframe.errors.ConfigError: --threshold: found 5; give a probability from 0 to 1
    """
    try:
        if isinstance(threshold, (str, bytes, bool)):
            raise TypeError
        number = float(threshold)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise ConfigError(f"{where}: found {format_value(threshold)}; give a probability from 0 to 1") from None
    if not (0 <= number <= 1 or number == inf):
        raise ConfigError(f"{where}: found {number:g}; give a probability from 0 to 1")
    return number


def patience_threshold(agreements: int) -> float:
    """Threshold of :func:`patience` that requires ``agreements`` exits to agree with the previous one.

    Raises:
        ConfigError: No whole number, or one below 0.

    >>> patience_threshold(0), patience_threshold(1)
    (0.0, 0.5)
    """
    require_count(agreements, least=0, where="patience_threshold: agreements")
    return agreements / (agreements + 1)


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """Early exit by thresholds: a sample stops at the first exit whose confidence reaches its threshold.

    Threshold 0 stops every sample at the first exit. A threshold above 1 never fires; with the fallback ``last``
    the confidence of such an exit is not even computed, unless a later one depends on it.

    Args:
        measure: The confidence measure.
        thresholds: One for all exits before the last, or one for each of them.
        fallback: Prediction where no exit fires: the ``last`` exit's, or that of the most ``confident`` exit, the
            last included; of equally confident exits the first.

    Raises:
        ConfigError: A threshold that is not a number, an unknown fallback, or a measure that is not a function.

    >>> ExitPolicy(thresholds=0.9).of_exits(3)
    (0.9, 0.9)
    """

    measure: ConfidenceMeasure = max_probability
    thresholds: float | tuple[float, ...]
    fallback: Fallback = "last"

    def __post_init__(self) -> None:
        given: Any = self.thresholds
        if isinstance(given, (Tensor, np.ndarray)):
            given = given.tolist()
        several = isinstance(given, (tuple, list))
        numbers = tuple(given if several else (given,))
        if any(isinstance(number, bool) or not isinstance(number, Real) or isnan(number) for number in numbers):
            raise ConfigError(f"policy: found thresholds {format_value(self.thresholds)}; give numbers")
        object.__setattr__(self, "thresholds", tuple(map(float, numbers)) if several else float(numbers[0]))
        if not callable(self.measure) or isinstance(self.measure, type):
            raise ConfigError(
                f"policy: found measure {format_value(self.measure)}; give a function, such as "
                f"CONFIDENCE_MEASURES.get('entropy'), or an object of a fitted one"
            )
        if self.fallback not in ("last", "confident"):
            raise ConfigError(f"policy: found fallback {self.fallback!r}; give 'last' or 'confident'")

    def of_exits(self, exits: int) -> tuple[float, ...]:
        """The threshold of each of ``exits`` exits but the last.

        Raises:
            ConfigError: The number of thresholds does not match.
        """
        if not isinstance(self.thresholds, tuple):
            return (float(self.thresholds),) * (exits - 1)
        if len(self.thresholds) != exits - 1:
            raise ConfigError(
                f"policy: found {len(self.thresholds)} thresholds for {exits} exits; give one, or one for each "
                "exit but the last"
            )
        return self.thresholds

    def answering_exits(self, exits: int, *, among: Collection[int] | None = None) -> tuple[int, ...]:
        """Indices of the exits that may give a sample's prediction because of their confidence, in order.

        These are the exits whose threshold can fire; with the fallback ``confident`` all exits, the last included.

        Args:
            exits: Number of exits K, the last included.
            among: Exits that may stop a sample, all if not given; the last always may.
        """
        thresholds, last = self.of_exits(exits), exits - 1
        confident = self.fallback == "confident"
        allowed = [exit for exit in range(last) if among is None or exit in among]
        return (*(exit for exit in allowed if confident or thresholds[exit] <= 1), *((last,) if confident else ()))

    def confidence_exits(self, exits: int, *, among: Collection[int] | None = None) -> tuple[int, ...]:
        """Indices of the exits whose confidence is needed, in order.

        These are the exits that may answer, see :meth:`answering_exits`; for a measure that carries values from exit to
        exit, such as ``patience``, also those before them, without which it would have other values than those that
        thresholds were solved on.

        Args:
            exits: Number of exits K, the last included.
            among: Exits that may stop a sample, all if not given; the last always may.

        >>> policy = ExitPolicy(thresholds=(0.5, 2.0, 0.5))
        >>> policy.confidence_exits(4), policy.confidence_exits(4, among=[0, 1])
        ((0, 2), (0,))
        >>> ExitPolicy(thresholds=(2.0, 2.0, 0.5, 2.0), measure=patience).confidence_exits(5)
        (0, 1, 2)
        """
        answering = self.answering_exits(exits, among=among)
        return tuple(range(answering[-1] + 1)) if answering and self._carries else answering

    @cached_property
    def _carries(self) -> bool:
        """Whether the measure carries values from exit to exit, tried on scores of 16 classes."""
        module = self.measure if isinstance(self.measure, nn.Module) else nn.Identity()
        place = next(iter((*module.parameters(), *module.buffers())), torch.zeros(()))
        with torch.no_grad(), _disable_current_modes():  # a counter of MACs must not count it
            return bool(self.measure(0, torch.zeros(1, 16, device=place.device), ())[1])


def _probabilities(scores_BC: Tensor) -> Tensor:
    """probabilities_BC in at least single precision: half precision cannot distinguish 0.999 from 1."""
    return scores_BC.softmax(1) if scores_BC.dtype == torch.float64 else scores_BC.float().softmax(1)


def fitted_class(name: str) -> type[FittedConfidence] | None:
    """The registered class ``name`` where it is a :class:`FittedConfidence`, otherwise None."""
    entry = CONFIDENCE_MEASURES.get(name)
    return entry if isinstance(entry, type) else None


def restore_confidence(name: str, state: Mapping[str, Tensor] | None, *, exits: int) -> ConfidenceMeasure:
    """The registered measure ``name``, with fitted parameters where it has some.

    Args:
        name: Name in :data:`CONFIDENCE_MEASURES`.
        state: ``state_dict`` of a :class:`FittedConfidence`; None before it is fitted, when no exit fires.
        exits: Number of exits K the measure was fitted for.

    Raises:
        UnknownNameError: No such measure; the message has the nearest name.
    """
    entry = CONFIDENCE_MEASURES.get(name)
    if not isinstance(entry, type):
        return entry
    if state is None:
        return _never_confident
    measure: FittedConfidence = entry(exits)
    device = next((value.device for value in state.values()), None)  # of nothing: load_state_dict refuses it
    measure.to(device=device).load_state_dict(dict(state))
    return measure


def _never_confident(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    return scores_BC.new_zeros(scores_BC.shape[0]), ()
