"""Early exits: heads on taps, ensembles, confidence measures, exit policies, dynamic inference, evaluation."""

from clframe.exits.budgets import Method, Solution, solve
from clframe.exits.calibration import Calibrated, Calibration
from clframe.exits.curves import AccuracyCostCurve, BudgetPoints, BudgetRule, accuracy_cost_curve, budget_points
from clframe.exits.decisions import (
    ALWAYS,
    NEVER,
    STATIC,
    Decision,
    ExitEvaluation,
    Outcome,
    Prediction,
    decide,
    evaluate_thresholds,
    select,
)
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.ensembles import EnsembleKind, fit_ensemble, fit_on_samples, make_ensemble
from clframe.exits.fusion import fuse_batch_norm
from clframe.exits.gate import LearnedConfidence, fit_learned_confidence
from clframe.exits.head_kinds import HeadKind, make_head, make_matched_head
from clframe.exits.learned import FailureConfidence
from clframe.exits.placement import ExitPlacement, place_exits
from clframe.exits.policies import (
    CONFIDENCE_MEASURES,
    ConfidenceMeasure,
    ExitPolicy,
    FittedConfidence,
    patience_threshold,
    register_confidence,
)
from clframe.nn.exit_ensemble import Carried, Ensemble

__all__ = [
    "ALWAYS", "CONFIDENCE_MEASURES", "NEVER", "STATIC", "AccuracyCostCurve", "BudgetPoints", "BudgetRule",
    "Calibrated", "Calibration", "Carried", "ConfidenceMeasure", "Decision", "DynamicNetwork", "Ensemble",
    "EnsembleKind", "ExitEvaluation", "ExitPlacement", "ExitPolicy", "FailureConfidence", "FittedConfidence",
    "HeadKind", "LearnedConfidence", "Method", "Outcome", "Prediction", "Solution", "accuracy_cost_curve",
    "budget_points", "decide", "evaluate_thresholds", "fit_ensemble", "fit_learned_confidence", "fit_on_samples",
    "fuse_batch_norm", "make_ensemble", "make_head", "make_matched_head", "patience_threshold", "place_exits",
    "register_confidence", "select", "solve",
]  # fmt: skip
