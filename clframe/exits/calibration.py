"""Calibration of exits: temperature, vector scaling and isotonic regression, fitted on validation data.

A calibration is the last step of an exit's scores, after its ensemble, so evaluation and dynamic inference apply the
same one. No calibration changes the prediction of an exit, except vector scaling, which may.

Dividing logits by a temperature never changes the order of the classes of one sample, but with three or more classes
it does change the order of samples by their largest probability: (0.6, 0.399, 0.001) and (0.6, 0.2, 0.2) are equally
confident at T = 1, and not at T = 2. Isotonic regression maps the largest probability by a monotone function, which
keeps the order of samples at an exit up to ties; of C classes met, the predicted one has at least 1 / C.

Sources: Guo et al., "On Calibration of Modern Neural Networks" (2017), temperature and vector scaling; Zadrozny and
Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates" (2002), isotonic regression.

Shape suffixes: B batch, C classes, K exits, N samples, M knots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError, DataError
from clframe.nn.exit_ensemble import Carried, Ensemble

Calibration = Literal["none", "temperature", "vector", "isotonic"]
"""Calibrations by name."""

HOTTEST, COLDEST = 100.0, 0.01
"""Limits of a temperature: with every validation sample predicted correctly the best one would be 0."""

RIDGE = 1e-3
"""Penalty on the squared distance of vector scaling from the identity: classes without samples keep scale 1, bias 0."""


MARGIN = 1e-4
"""By how much isotonic regression keeps the first class above the second, relative to all but the first."""


def fit_temperature(logits_NC: Tensor, y_N: Tensor) -> float:
    """Temperature T that minimizes the negative log-likelihood of ``softmax(logits / T)``.

    The likelihood is convex in 1 / T; its derivative, mean(E_p[z] - z_y), is solved by bisection in double precision.

    Args:
        logits_NC: Of one exit on held-out samples; columns of ``-inf`` are classes not met.
        y_N: Classes.

    Returns:
        T between :data:`COLDEST` and :data:`HOTTEST`.

    Raises:
        DataError: No samples, or logits that are NaN.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> round(2 / fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # log-odds of 3 in 4: ln 3
    1.0986
    """
    logits_NC = _checked(logits_NC, y_N)
    finite_NC = logits_NC.masked_fill(logits_NC.isinf(), 0.0)
    target_N = logits_NC.gather(1, y_N[:, None])[:, 0]
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(60):
        beta = (low * high) ** 0.5
        slope = ((F.softmax(beta * logits_NC, 1) * finite_NC).sum(1) - target_N).mean()
        low, high = (beta, high) if slope <= 0 else (low, beta)
    return float(1 / (low * high) ** 0.5)


def fit_vector_scaling(logits_NC: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and bias of each class that minimize the negative log-likelihood of ``softmax(scale * logits + bias)``.

    A ridge of :data:`RIDGE` pulls towards scale 1 and bias 0. L-BFGS in double precision.

    Args:
        logits_NC: As for :func:`fit_temperature`.
        y_N: Classes.

    Returns:
        scale_C and bias_C.
    """
    logits_NC = _checked(logits_NC, y_N)
    finite_NC = logits_NC.masked_fill(logits_NC.isinf(), 0.0)
    unmet_C = logits_NC.isinf().all(0)
    scale_C = torch.ones(logits_NC.shape[1], dtype=torch.float64, requires_grad=True)
    bias_C = torch.zeros(logits_NC.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale_C, bias_C], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores_NC = (finite_NC * scale_C + bias_C).masked_fill(unmet_C, -torch.inf)
        loss = F.cross_entropy(scores_NC, y_N) + RIDGE * ((scale_C - 1).square() + bias_C.square()).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return scale_C.detach(), bias_C.detach()


def fit_isotonic(confidence_N: Tensor, correct_N: Tensor) -> tuple[Tensor, Tensor]:
    """Knots of the monotone function from largest probability to accuracy with the least squared error.

    Args:
        confidence_N: Largest probabilities of one exit on held-out samples.
        correct_N: Whether each prediction is correct.

    Returns:
        x_M, ascending, and y_M; the function is linear between knots and constant outside.
    """
    from sklearn.isotonic import IsotonicRegression

    if not len(confidence_N):
        raise DataError("calibration: found no held-out samples; set benchmark.validation=0.1")
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    fitted.fit(confidence_N.double().numpy(), correct_N.double().numpy())
    return torch.as_tensor(fitted.X_thresholds_), torch.as_tensor(fitted.y_thresholds_)


def interpolate(x_B: Tensor, knots_M: Tensor, values_M: Tensor) -> Tensor:
    """Piecewise linear function through the knots, constant outside of them.

    >>> interpolate(torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])).tolist()
    [1.0, 2.0, 3.0]
    """
    if len(knots_M) == 1:
        return values_M.expand_as(x_B).clone()
    right_B = torch.searchsorted(knots_M, x_B.contiguous()).clamp(1, len(knots_M) - 1)
    left_B = right_B - 1
    width_B = knots_M[right_B] - knots_M[left_B]
    share_B = ((x_B - knots_M[left_B]) / width_B.clamp_min(torch.finfo(x_B.dtype).tiny)).clamp(0, 1)
    return values_M[left_B] + share_B * (values_M[right_B] - values_M[left_B])


class Calibrated(Ensemble):
    """Scores of an ensemble, calibrated exit by exit; the identity before it is fitted.

    Args:
        ensemble: The scores to calibrate.
        kind: ``temperature``, ``vector`` or ``isotonic``.
        exits: Number K of exits.

    Raises:
        ConfigError: An unknown kind.
    """

    fitted: Tensor

    def __init__(self, ensemble: Ensemble, kind: Calibration, *, exits: int) -> None:
        super().__init__()
        if kind not in get_args(Calibration) or kind == "none":
            raise ConfigError(f"calibration: found '{kind}'; give temperature, vector or isotonic")
        self.ensemble, self.kind, self.exits = ensemble, kind, exits
        # Parameters without gradients: nothing trains them, and every checkpoint contains them.
        self.first = nn.ParameterList([nn.Parameter(torch.ones(1), requires_grad=False) for _ in range(exits)])
        self.second = nn.ParameterList([nn.Parameter(torch.zeros(1), requires_grad=False) for _ in range(exits)])
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        # The same on the host: reading the buffer at every step would synchronize with the device.
        self._is_fitted = False

    @property
    def inner(self) -> Ensemble:
        """The ensemble that is calibrated."""
        return self.ensemble.inner

    def grow(self, classes: Iterable[int]) -> bool:
        """Grow the ensemble; a class that vector scaling was not fitted on has scale 1 and bias 0."""
        return self.ensemble.grow(classes)

    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Calibrated scores of one exit."""
        scores_BC, carried = self.ensemble.step(exit, logits_BC, carried)
        return self.calibrate(exit, scores_BC), carried

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Calibrated scores of every exit."""
        return tuple(self.calibrate(exit, scores_BC) for exit, scores_BC in enumerate(self.ensemble(logits)))

    def calibrate(self, exit: int, scores_BC: Tensor) -> Tensor:
        """Apply the calibration of one exit to its scores."""
        if not scores_BC.shape[1] or not self._is_fitted:
            return scores_BC
        first, second = self.first[exit], self.second[exit]
        if self.kind == "temperature":
            temperature_1: Tensor = first.to(scores_BC.dtype)
            return scores_BC / temperature_1
        if self.kind == "vector":
            known = min(len(first), scores_BC.shape[1])
            scale_C, bias_C = scores_BC.new_ones(scores_BC.shape[1]), scores_BC.new_zeros(scores_BC.shape[1])
            scale_C[:known], bias_C[:known] = first[:known].to(scale_C.dtype), second[:known].to(bias_C.dtype)
            # A class not met stays -inf whatever the sign of its scale.
            return torch.where(scores_BC.isinf(), scores_BC, scores_BC * scale_C + bias_C)
        return _with_confidence(scores_BC, first, second)

    def fit(self, logits: Sequence[Tensor], y_N: Tensor) -> None:
        """Fit every exit on held-out logits.

        Args:
            logits: logits_NC of every exit, in order of depth, before the ensemble.
            y_N: Classes.

        Raises:
            DataError: No samples, or logits that are NaN.
        """
        with torch.no_grad():
            scores = [scores_NC.cpu() for scores_NC in self.ensemble([each.to(self.fitted.device) for each in logits])]
        y_N = y_N.cpu()
        for exit, scores_NC in enumerate(scores):
            if self.kind == "temperature":
                found = torch.tensor([fit_temperature(scores_NC, y_N)]), torch.zeros(1)
            elif self.kind == "vector":
                found = fit_vector_scaling(scores_NC, y_N)
            else:
                top_N, class_N = _checked(scores_NC, y_N).softmax(1).max(1)
                found = fit_isotonic(top_N, class_N == y_N)
            self._set(exit, *found)
        self.fitted.fill_(True)
        self._is_fitted = True

    def _set(self, exit: int, first: Tensor, second: Tensor) -> None:
        place: Any = {"device": self.fitted.device, "dtype": torch.float32}
        self.first[exit] = nn.Parameter(first.to(**place), requires_grad=False)
        self.second[exit] = nn.Parameter(second.to(**place), requires_grad=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Sizes depend on the data a calibration was fitted on: take those of the checkpoint.
        for exit in range(self.exits):
            first, second = (state_dict.get(f"{prefix}{name}.{exit}") for name in ("first", "second"))
            if isinstance(first, Tensor) and isinstance(second, Tensor):
                self._set(exit, first, second)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._is_fitted = bool(self.fitted)


def _with_confidence(scores_BC: Tensor, knots_M: Tensor, values_M: Tensor) -> Tensor:
    """Log-probabilities whose largest one is the calibrated confidence.

    A calibration must not change the prediction. So the other classes keep their proportions only where none of them
    then exceeds the confidence; otherwise they are mixed with the uniform distribution until the second one is just
    below it. Only a confidence below 1 / C is raised, the lowest one at which the predicted class can be the largest.
    """
    if scores_BC.shape[1] == 1:
        return scores_BC
    scores_BC, dtype = scores_BC.float(), scores_BC.dtype
    top_B1, class_B1 = scores_BC.log_softmax(1).max(1, keepdim=True)
    # Logarithms, since 1 - p of a sure sample is 0 in float32 while the probabilities of the other classes are not.
    others_BC = scores_BC.scatter(1, class_B1, -torch.inf)
    met_BC = ~others_BC.isinf()
    others_BC = torch.where(met_BC, others_BC - others_BC.logsumexp(1, keepdim=True), -torch.inf)
    count_B1 = met_BC.sum(1, keepdim=True)
    even_B1 = torch.where(count_B1 > 0, 1 / count_B1.clamp_min(1), 0.0)  # share of each of the others if all are alike
    wanted_B1 = interpolate(top_B1.exp(), knots_M, values_M)
    confidence_B1 = torch.maximum(wanted_B1, (even_B1 + MARGIN) / (1 + even_B1)).clamp(max=1 - 1e-7)
    second_B1 = others_BC.amax(1, keepdim=True).exp()
    most_B1 = (confidence_B1 - MARGIN) / (1 - confidence_B1)  # share of the second class among the others
    excess_B1 = second_B1 - most_B1
    mixed_B1 = (excess_B1 / (second_B1 - even_B1).clamp_min(1e-12)).clamp(0, 1)
    mixed_BC = torch.log((1 - mixed_B1) * others_BC.exp() + mixed_B1 * even_B1)
    others_BC = torch.where(met_BC & (excess_B1 > 0), mixed_BC, others_BC)
    calibrated_BC = others_BC + torch.log1p(-confidence_B1)
    return calibrated_BC.scatter(1, class_B1, confidence_B1.log()).to(dtype)


def _checked(logits_NC: Tensor, y_N: Tensor) -> Tensor:
    if not len(y_N):
        raise DataError("calibration: found no held-out samples; set benchmark.validation=0.1")
    if (logits_NC.isnan() | logits_NC.isposinf()).any():  # -inf is the logit of a class that is not learned yet
        raise DataError("calibration: found NaN or infinite logits; lower optimizer.lr, training has diverged")
    return logits_NC.double().cpu()
