"""Thresholds that rounding in another runtime does not move past the samples they were chosen on.

A solver finds the confidence of a sample. As a threshold, that number stops the sample only as long as it is computed
to the last bit as before, which other kernels, batch sizes and runtimes do not promise.

Shape suffixes: M samples that reach an exit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clframe.exits.decisions import ALWAYS, ExitEvaluation, decide

CLEARANCE = 1e-5
"""Distance of a threshold from the confidences that it separates, for confidences from 0 to 1.

Some 100 times the rounding of float32 near 1, and so small that few other samples have a confidence in between.
"""


def clear_threshold(threshold: float, confidence_M: Tensor) -> float:
    """Move a threshold away from the confidences next to it; it stops the same of these samples.

    With c the lowest confidence that reaches the threshold, b the highest one that does not and h halfway between them,
    the result is the number next to the threshold from ``min(h, b + CLEARANCE)`` to ``max(h, c - CLEARANCE)``, in
    float32. So a threshold found at c becomes ``max(h, c - CLEARANCE)``, and rounding of less than half of ``c - b``
    and less than the clearance changes no decision on these samples. A magnitude of c above 1 multiplies the clearance,
    and the result is negative only if c is. It is c where float32 has no number between b and c.

    Args:
        threshold: Infinite ones, and those that no sample reaches, are returned as they are.
        confidence_M: Confidences of the samples that the threshold decides on, of type float64; -inf for none.

    >>> confidence_M = torch.tensor([0.9, 0.5, 0.499999], dtype=torch.float64)
    >>> [round(clear_threshold(t, confidence_M), 7) for t in (0.9, 0.5)]
    [0.89999, 0.4999995]
    """
    reached_M = confidence_M[confidence_M >= threshold]
    if not math.isfinite(threshold) or not len(reached_M):
        return threshold
    below_M = confidence_M[confidence_M < threshold]
    lowest, highest = float(reached_M.min()), float(below_M.max()) if len(below_M) else ALWAYS
    clearance, halfway = CLEARANCE * max(1.0, abs(lowest)), (lowest + highest) / 2
    cleared = max(min(halfway, highest + clearance), min(threshold, max(halfway, lowest - clearance)))
    # Dynamic inference compares in float32: rounded there, the threshold must not become the other confidence.
    cleared = float(torch.tensor(max(cleared, 0.0) if lowest >= 0 else cleared, dtype=torch.float32))
    return cleared if highest < cleared < lowest else lowest


def clear_thresholds(evaluation: ExitEvaluation, thresholds: Sequence[float]) -> tuple[float, ...]:
    """Apply :func:`clear_threshold` to the threshold of each exit and the samples that reach it.

    Every sample still stops at the same exit.

    Args:
        evaluation: The samples that the thresholds were chosen on.
        thresholds: One for each exit but the last.
    """
    stop_N = decide(evaluation, thresholds).stop_N
    return tuple(
        clear_threshold(threshold, evaluation.confidence_KN[exit, stop_N >= exit])
        for exit, threshold in enumerate(thresholds)
    )
