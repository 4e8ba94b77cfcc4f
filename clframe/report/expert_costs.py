"""Mean cost of a run's predictions with experts, compared with the dense network that was divided into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clframe.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ExpertCosts:
    """MACs of a prediction of a network with experts, at the end of a run.

    Attributes:
        mean: Mean over the test samples, with the routers and the experts that ran.
        dense: MACs of the dense network: all experts, no router, all exits.
        samples: Test samples on which the experts were counted; 0 where not recorded.
    """

    mean: float
    dense: float
    samples: int

    @property
    def share(self) -> str:
        """The mean as a share of the dense network."""
        return f"{100 * self.mean / self.dense:.1f} % of the dense network"

    @property
    def counted(self) -> str:
        """The samples on which the experts were counted, in brackets after the mean; empty where not recorded."""
        return f" (experts counted on {self.samples:,} test samples)" if self.samples else ""


def expert_costs(run: Path) -> ExpertCosts | None:
    """Read the costs of a run's predictions; None without experts or where they are unknown."""
    costs = RunFolder(run).prediction_costs()
    roles, mean = costs.get("dense_by_role"), costs.get("mean")
    if not isinstance(mean, (int, float)) or not isinstance(roles, dict) or not roles.get("experts"):
        return None
    # The role of routers is 0 here: MACs that the dense network does not have.
    return ExpertCosts(mean=mean, dense=sum(roles.values()), samples=int(costs.get("expert_samples", 0)))
