"""What dynamic inference carries for the samples of a batch, and what leaves with them.

Shape suffixes: B batch, n samples still in it, r samples that stay, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clframe.nn.backbones.base import Flow
from clframe.nn.exits.ensemble import Carried
from clframe.nn.exits.static import Answer


@dataclass
class Rows:
    """The samples still in the batch and all that is carried for them, batch first."""

    value: Flow
    """What the last stage returned."""
    index_n: Tensor | None = None
    """Their places in the input; None while all are there."""
    previous_nC: Tensor | None = None
    """Logits of the exit before, where the next one uses them."""
    ensembled: Carried = ()
    measured: Carried = ()
    answer_nC: Tensor | None = None
    """The answers so far: final where done, else the surest yet or not yet of any meaning."""
    exit_n: Tensor | None = None
    best_n: Tensor | None = None
    """Confidence of the surest exit so far, where that counts."""
    done_n: Tensor | None = None
    """Finished samples that have not left yet; None where nobody has finished."""

    def take(self, exit: int, scores_nC: Tensor, takes_n: Tensor | None) -> None:
        """Make the scores the answer of the samples that take them, None for all, if not done already."""
        exit_n = scores_nC.new_full(scores_nC.shape[:1], exit, dtype=torch.long)
        if self.answer_nC is None or self.exit_n is None:
            self.answer_nC, self.exit_n = scores_nC, exit_n
            return
        if self.done_n is not None:
            takes_n = ~self.done_n if takes_n is None else takes_n & ~self.done_n
        if takes_n is None:
            self.answer_nC, self.exit_n = scores_nC, exit_n
            return
        self.answer_nC = torch.where(takes_n.unsqueeze(1), scores_nC, self.answer_nC)
        self.exit_n = torch.where(takes_n, exit_n, self.exit_n)

    def surer(self, confidence_n: Tensor, fires_n: Tensor | None) -> Tensor | None:
        """Where an exit fires or is the surest so far, None for everywhere; from now on it counts as such."""
        if self.best_n is None:
            self.best_n = confidence_n
            return None
        surer_n = confidence_n > self.best_n
        self.best_n = torch.maximum(self.best_n, confidence_n)
        return surer_n if fires_n is None else surer_n | fires_n

    def keep(self, keep_r: Tensor) -> None:
        """Go on with the rows of these numbers only."""
        self.value = rows_of_flow(self.value, keep_r)
        self.index_n = keep_r if self.index_n is None else self.index_n.index_select(0, keep_r)
        self.previous_nC = _optional_rows(self.previous_nC, keep_r)
        self.ensembled = tuple(_rows(carried, keep_r) for carried in self.ensembled)
        self.measured = tuple(_rows(carried, keep_r) for carried in self.measured)
        surest = self.best_n is not None  # otherwise the answers of those that stay have no meaning yet
        self.answer_nC = _optional_rows(self.answer_nC, keep_r) if surest else None
        self.exit_n = _optional_rows(self.exit_n, keep_r) if surest else None
        self.best_n = _optional_rows(self.best_n, keep_r)
        self.done_n = None


class Answers:
    """Answers in the order of the input, put down as samples leave."""

    def __init__(self) -> None:
        self._answer: Answer | None = None

    def put(self, rows: Rows) -> None:
        """Put down the answers of all rows, also those that will be overwritten because they go on."""
        assert rows.answer_nC is not None and rows.exit_n is not None
        if self._answer is None:
            self._answer = Answer(rows.answer_nC.clone(), rows.exit_n.clone())
            return
        assert rows.index_n is not None
        scores_BC, exit_B = self._answer
        dtype = torch.promote_types(scores_BC.dtype, rows.answer_nC.dtype)  # under autocast exits may differ
        scores_BC = scores_BC.to(dtype).index_copy_(0, rows.index_n, rows.answer_nC.to(dtype))
        self._answer = Answer(scores_BC, exit_B.index_copy_(0, rows.index_n, rows.exit_n))

    def end(self, rows: Rows) -> Answer:
        """The answers of the whole batch, now that the last rows have theirs."""
        assert rows.answer_nC is not None and rows.exit_n is not None
        if self._answer is None:
            return Answer(rows.answer_nC, rows.exit_n)
        self.put(rows)
        return self._answer


def rows_of_flow(value: Flow, keep_r: Tensor) -> Flow:
    """The rows of what goes from stage to stage, whatever travels with the tap."""
    return _rows(value, keep_r) if isinstance(value, Tensor) else tuple(_rows(part, keep_r) for part in value)


def _rows(values: Tensor, keep_r: Tensor) -> Tensor:
    """Rows of a tensor in its own memory format; ``index_select`` would give up channels-last, which is slow."""
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).index_select(0, keep_r).permute(0, 3, 1, 2)
    return values.index_select(0, keep_r)


def _optional_rows(values: Tensor | None, keep_r: Tensor) -> Tensor | None:
    return None if values is None else _rows(values, keep_r)
