"""The samples of a batch that have not left dynamic inference, and the predictions of all.

Shape suffixes: B batch, n samples still in the batch, r rows of it, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clframe.exits.decisions import Prediction
from clframe.exits.row_buffers import is_channels_last
from clframe.nn.backbones.stages import Flow
from clframe.nn.exit_ensemble import Carried


@dataclass
class ActiveSamples:
    """The samples still in the batch with everything carried for them, batch first."""

    value: Flow
    """Output of the last stage."""
    index_n: Tensor | None = None
    """Their indices in the input; None while no sample has been removed."""
    previous_nC: Tensor | None = None
    """Uncorrected logits of the previous exit, where the next one uses them."""
    ensembled: Carried = ()
    measured: Carried = ()
    scores_nC: Tensor | None = None
    """Scores so far: final where stopped, else of the most confident exit, or undefined with the fallback ``last``."""
    exit_n: Tensor | None = None
    best_n: Tensor | None = None
    """Highest confidence so far, with the fallback ``confident``."""
    done_n: Tensor | None = None
    """Stopped samples that are still in the batch; None where there are none."""

    def take(self, exit: int, scores_nC: Tensor, takes_n: Tensor | None) -> None:
        """Set the scores of the samples ``takes_n``, None for all, except those that have stopped."""
        exit_n = scores_nC.new_full(scores_nC.shape[:1], exit, dtype=torch.long)
        if self.scores_nC is None or self.exit_n is None:
            self.scores_nC, self.exit_n = scores_nC, exit_n
            return
        if self.done_n is not None:
            takes_n = ~self.done_n if takes_n is None else takes_n & ~self.done_n
        if takes_n is None:
            self.scores_nC, self.exit_n = scores_nC, exit_n
            return
        self.scores_nC = torch.where(takes_n.unsqueeze(1), scores_nC, self.scores_nC)
        self.exit_n = torch.where(takes_n, exit_n, self.exit_n)

    def update_best(self, confidence_n: Tensor, fires_n: Tensor | None) -> Tensor | None:
        """Update the highest confidence; the samples where the exit fires or is the most confident, None for all."""
        if self.best_n is None:
            self.best_n = confidence_n
            return None
        higher_n = confidence_n > self.best_n
        self.best_n = torch.maximum(self.best_n, confidence_n)
        return higher_n if fires_n is None else higher_n | fires_n

    @property
    def keeps_scores(self) -> bool:
        """Whether scores of samples that have not stopped may be used: with the fallback ``confident`` only."""
        return self.best_n is not None

    def carried(self) -> list[Tensor]:
        """All tensors that the next stages and exits need, batch first; scores where :attr:`keeps_scores`."""
        found: list[Tensor] = []

        def note(values: Tensor) -> Tensor:
            found.append(values)
            return values

        self.map(note)
        return found

    def map(self, call: Callable[[Tensor], Tensor]) -> ActiveSamples:
        """Apply ``call`` to every tensor of :meth:`carried`, in its order; the result has nothing else."""

        def optional(values: Tensor | None) -> Tensor | None:
            return None if values is None else call(values)

        return ActiveSamples(
            call(self.value) if isinstance(self.value, Tensor) else tuple(map(call, self.value)),
            previous_nC=optional(self.previous_nC),
            ensembled=tuple(map(call, self.ensembled)),
            measured=tuple(map(call, self.measured)),
            scores_nC=optional(self.scores_nC) if self.keeps_scores else None,
            exit_n=optional(self.exit_n) if self.keeps_scores else None,
            best_n=optional(self.best_n),
        )

    def keep(self, keep_r: Tensor) -> None:
        """Remove all rows but those with these indices."""
        self.value = rows_of_flow(self.value, keep_r)
        self.index_n = keep_r if self.index_n is None else self.index_n.index_select(0, keep_r)
        self.previous_nC = _optional_rows(self.previous_nC, keep_r)
        self.ensembled = tuple(_rows(carried, keep_r) for carried in self.ensembled)
        self.measured = tuple(_rows(carried, keep_r) for carried in self.measured)
        self.scores_nC = _optional_rows(self.scores_nC, keep_r) if self.keeps_scores else None
        self.exit_n = _optional_rows(self.exit_n, keep_r) if self.keeps_scores else None
        self.best_n = _optional_rows(self.best_n, keep_r)
        self.done_n = None


class PredictionBuffer:
    """Predictions in the order of the input, written as samples leave the batch."""

    def __init__(self) -> None:
        self._prediction: Prediction | None = None

    def write(self, rows: ActiveSamples) -> None:
        """Write the predictions of all rows; those of samples that continue are overwritten later."""
        assert rows.scores_nC is not None and rows.exit_n is not None
        if self._prediction is None:
            self._prediction = Prediction(rows.scores_nC.clone(), rows.exit_n.clone())
            return
        assert rows.index_n is not None
        scores_BC, exit_B = self._prediction
        dtype = torch.promote_types(scores_BC.dtype, rows.scores_nC.dtype)  # under autocast exits may differ
        scores_BC = scores_BC.to(dtype).index_copy_(0, rows.index_n, rows.scores_nC.to(dtype))
        self._prediction = Prediction(scores_BC, exit_B.index_copy_(0, rows.index_n, rows.exit_n))

    def finish(self, rows: ActiveSamples) -> Prediction:
        """Write the last rows and return the predictions of the whole batch."""
        assert rows.scores_nC is not None and rows.exit_n is not None
        if self._prediction is None:
            return Prediction(rows.scores_nC, rows.exit_n)
        self.write(rows)
        return self._prediction


def rows_of_flow(value: Flow, keep_r: Tensor) -> Flow:
    """Rows of a stage's output: of the tap and of every tensor passed along with it."""
    return _rows(value, keep_r) if isinstance(value, Tensor) else tuple(_rows(part, keep_r) for part in value)


def _rows(values: Tensor, keep_r: Tensor) -> Tensor:
    """Rows of a tensor in its memory format."""
    # index_select returns contiguous tensors: every later convolution would convert them back to channels-last.
    if is_channels_last(values):
        return values.permute(0, 2, 3, 1).index_select(0, keep_r).permute(0, 3, 1, 2)
    return values.index_select(0, keep_r)


def _optional_rows(values: Tensor | None, keep_r: Tensor) -> Tensor | None:
    return None if values is None else _rows(values, keep_r)
