"""Early exits: heads on taps, ensembles, confidence measures, exit policies, dynamic inference, evaluation."""

from clframe.exits.budgets import Method, Realized, Solution, realize, solve
from clframe.exits.curves import BudgetPoints, Curve, accuracy_cost_curve, budget_points
from clframe.exits.decisions import (
    ALWAYS,
    NEVER,
    STATIC,
    Answer,
    Decision,
    ExitAnswers,
    Outcome,
    decide,
    select,
    who_answers,
)
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.ensembles import EnsembleKind, fit_ensemble, fit_on_samples, make_ensemble
from clframe.exits.fusion import folded
from clframe.exits.head_kinds import HeadKind, make_head, matched_head
from clframe.exits.placement import Placement, place
from clframe.exits.policies import MEASURES, ExitPolicy, Gate, Measure, fit_gate, patience_threshold
from clframe.nn.network import Ensemble

__all__ = [
    "ALWAYS", "MEASURES", "NEVER", "STATIC", "Answer", "BudgetPoints", "Curve", "Decision", "DynamicNetwork",
    "Ensemble", "EnsembleKind", "ExitAnswers", "ExitPolicy", "Gate", "HeadKind", "Measure", "Method", "Outcome",
    "Placement", "Realized", "Solution", "accuracy_cost_curve", "budget_points", "decide", "fit_ensemble", "fit_gate",
    "fit_on_samples", "folded", "make_ensemble", "make_head", "matched_head", "patience_threshold", "place", "realize",
    "select", "solve", "who_answers",
]  # fmt: skip
