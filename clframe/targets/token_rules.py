"""Rules by which the exits of a run's language model decide the tokens that it generates.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clframe.errors import UnsupportedError
from clframe.exits import STATIC, ExitPolicy
from clframe.nn.exit_ensemble import Carried
from clframe.nn.generation import LastExit, TokenRule
from clframe.targets.rules import PredictionRule
from clframe.training.trained import TrainedModel


@dataclass(frozen=True)
class PolicyRule:
    """An exit policy as a rule for single tokens; its decisions are those of :func:`~clframe.exits.select`.

    Args:
        policy: The policy.
        count: Number of exits.
    """

    policy: ExitPolicy
    count: int

    @property
    def exits(self) -> Sequence[int]:
        """The exits before the last whose confidence counts."""
        return [exit for exit in self.policy.confidence_exits(self.count) if exit < self.count - 1]

    def stops(self, exit: int, logits_1V: Tensor, carried: Carried) -> tuple[bool, Carried]:
        """Compare the confidence with the threshold of the exit."""
        confidence_1, carried = self.policy.measure(exit, logits_1V, carried)
        return bool(confidence_1 >= self.policy.of_exits(self.count)[exit]), carried

    def decide(self, logits: Sequence[Tensor]) -> int:
        """Return the last one, or with the fallback ``confident`` the first of the most confident ones."""
        if self.policy.fallback == "last":
            return len(logits) - 1
        carried: Carried = ()
        confidences: list[float] = []
        for exit, logits_1V in zip(self.policy.confidence_exits(self.count), logits, strict=True):
            confidence_1, carried = self.policy.measure(exit, logits_1V, carried)
            confidences.append(float(confidence_1))
        return confidences.index(max(confidences))


def token_rule(
    model: TrainedModel, *, threshold: float | None = None, budget: float | None = None
) -> tuple[TokenRule, str]:
    """Return the rule by which a model generates, and its description.

    Args:
        model: A language model.
        threshold: Largest probability of a token from which an exit decides; None: the strategy's rule.
        budget: See :class:`~clframe.targets.rules.PredictionRule`.

    Raises:
        UnsupportedError: The strategy's rule combines the scores of all exits.
        ClframeError: See :class:`~clframe.targets.rules.PredictionRule`.
    """
    found = PredictionRule(model, threshold=threshold, budget=budget, graphs=False)
    if found.policy is not None:
        return PolicyRule(found.policy, len(model.network.heads)), found.description
    owner = model.learner.composition.owner("prediction")
    rule = getattr(owner, "rule", "last")
    if owner is not None and rule != "last" and rule in STATIC:
        raise UnsupportedError(
            f"predict: {found.description} combines all exits, which generation does not compute; give --threshold, or "
            f"--threshold inf for the last exit"
        )
    return LastExit(), found.description
