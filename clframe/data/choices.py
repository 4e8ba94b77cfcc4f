"""Multiple-choice questions for language models: a JSON-lines file, and batches of questions with their choices.

Shape suffixes: B rows (choices of all questions of a batch), T tokens, Q questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clframe.data.sources.paths import read_text
from clframe.data.sources.text import pad_ids
from clframe.data.target import IGNORED, Batch, Batches, strided_indices
from clframe.errors import DataError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


class Choices(NamedTuple):
    """Division of the rows of a batch into questions."""

    counts: tuple[int, ...]
    """Number of choices of each question."""
    answers: tuple[int, ...]
    """Index of the right choice of each question."""
    characters_B: Tensor
    """Length of each choice in characters."""


def read_questions(file: Path) -> tuple[Question, ...]:
    """Read a file with one JSON object per line: ``{"question": "...", "choices": ["...", "..."], "answer": 0}``.

    ``context`` may be given instead of ``question``; other keys are ignored.

    Raises:
        DataError: No file, an empty one, or a line that is not such an object.
    """
    if not file.is_file():
        raise DataError(f"--data: no file {file}; give a file with one JSON object per line")
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
            text, choices, answer = tree.get("question", tree.get("context")), tree["choices"], tree["answer"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            text, choices, answer = None, None, None
        strings = isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)
        if not isinstance(text, str) or not text.strip() or not strings or not isinstance(answer, int):
            raise DataError(
                f'--data: line {number} of {file} is not {{"question": "...", "choices": ["...", "..."], "answer": 0}};'
                f" correct it"
            )
        if len(choices) < 2 or not 0 <= answer < len(choices) or isinstance(answer, bool):
            raise DataError(
                f"--data: line {number} of {file} has {len(choices)} choices and answer {answer}; give at least 2 "
                f"choices, and the index of the right one from 0"
            )
        found.append(Question(text.strip(), tuple(one.strip() for one in choices), answer))
    if not found:
        raise DataError(f"--data: {file} contains no question; give one JSON object per line")
    return tuple(found)


class ChoiceSplit:
    """Questions as rows of token ids: one row for each choice, the question and the choice joined by a space.

    The tokens of a choice, which are scored, are those after the longest common start of the ids of the row and of the
    question alone.

    Args:
        questions: The questions.
        encode: Maps a text to its ids, with special tokens at the start only.
        longest: Maximum number of ids of a row.
        padding: Id of the padding token.
        device: Device of the batches.

    Raises:
        DataError: A row that is longer, or one without context or choice.
    """

    def __init__(
        self, questions: Sequence[Question], *, encode: Encode, longest: int, padding: int, device: torch.device
    ) -> None:
        self.questions, self.padding, self.device = tuple(questions), padding, device
        self.rows = [[_row(one.text, choice, encode) for choice in one.choices] for one in questions]
        for number, rows in enumerate(self.rows, start=1):
            most = max(len(ids) for ids, _ in rows)
            if most > longest:
                raise DataError(
                    f"--length: question {number} has {most} tokens with a choice, more than {longest}; give --length "
                    f"{most} if the model reads as many"
                )
            if any(not 0 < start < len(ids) for ids, start in rows):
                raise DataError(f"--data: question {number} or one of its choices has no tokens; give longer texts")

    def __len__(self) -> int:
        return len(self.questions)

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """Batches of ``size`` questions, see :class:`~clframe.data.target.DataSplit`."""
        return Batches([partial(self._make_batch, index) for index in self._indices(size, limit)])

    def choices(self, *, size: int = 64, limit: int | None = None) -> list[Choices]:
        """The division into questions of each of :meth:`batches`."""
        found = []
        for index in self._indices(size, limit):
            asked = [self.questions[at] for at in index]
            characters = [len(choice) for one in asked for choice in one.choices]
            found.append(
                Choices(
                    tuple(len(one.choices) for one in asked), tuple(one.answer for one in asked),
                    torch.tensor(characters, dtype=torch.float64),
                )
            )  # fmt: skip
        return found

    def _indices(self, size: int, limit: int | None) -> list[list[int]]:
        order = strided_indices(len(self), limit).tolist()
        order.sort(key=lambda at: max(len(ids) for ids, _ in self.rows[at]))  # little padding
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _make_batch(self, index: Sequence[int]) -> Batch:
        rows = [row for at in index for row in self.rows[at]]
        ids_BT = pad_ids([ids for ids, _ in rows], padding=self.padding).long().to(self.device)
        start_B, stop_B = torch.tensor([(start, len(ids)) for ids, start in rows], device=self.device).unbind(1)
        at_T = torch.arange(ids_BT.shape[1], device=self.device)
        mask_BT = at_T < stop_B[:, None]
        scored_BT = mask_BT & (at_T >= start_B[:, None])
        targets_BT = torch.full_like(ids_BT, IGNORED)
        targets_BT[:, :-1] = ids_BT[:, 1:].where(scored_BT[:, 1:], IGNORED)
        return Batch({"input_ids": ids_BT, "attention_mask": mask_BT.long()}, targets_BT, mask_BT)


def _row(question: str, choice: str, encode: Encode) -> tuple[list[int], int]:
    """Return ids of question and choice, and the index of the first id of the choice."""
    ids, context = encode(f"{question} {choice}"), encode(question)
    common = next((at for at, (one, other) in enumerate(zip(ids, context, strict=False)) if one != other), None)
    return ids, min(len(ids), len(context)) if common is None else common


def right_choices(log_likelihood_B: Tensor, choices: Choices, *, normalized: bool) -> Tensor:
    """Return right_Q: 1 where the right choice is the most likely one of its question, else 0; a tie is not right.

    Args:
        log_likelihood_B: Sum of the log-likelihoods of the tokens of each choice, given the question.
        choices: Division of the rows into questions.
        normalized: Whether sums are divided by the length of the choice in characters.

    >>> two = Choices((2,), (0,), torch.tensor([6.0, 2.0]))
    >>> [right_choices(torch.tensor([-4.0, -2.0]), two, normalized=n).item() for n in (False, True)]
    [0.0, 1.0]
    """
    score_B = log_likelihood_B.double().cpu()
    if normalized:
        score_B = score_B / choices.characters_B
    right = []
    for own, answer in zip(score_B.split(list(choices.counts)), choices.answers, strict=True):
        right.append(float((own >= own[answer]).sum() == 1))
    return torch.tensor(right)
