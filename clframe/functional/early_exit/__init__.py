"""Early exit on stored answers: who answers, accuracy against cost, thresholds for a budget."""

from clframe.functional.early_exit.answers import ExitAnswers
from clframe.functional.early_exit.budgets import Method, Realized, Solution, realize, solve
from clframe.functional.early_exit.curves import BudgetPoints, Curve, accuracy_cost_curve, budget_points
from clframe.functional.early_exit.decisions import ALWAYS, NEVER, Decision, Outcome, decide, who_answers

__all__ = [
    "ALWAYS", "NEVER", "BudgetPoints", "Curve", "Decision", "ExitAnswers", "Method", "Outcome", "Realized", "Solution",
    "accuracy_cost_curve", "budget_points", "decide", "realize", "solve", "who_answers",
]  # fmt: skip
