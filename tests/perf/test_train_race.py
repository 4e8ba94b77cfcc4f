"""The training race: all loops train the same, also where they take turns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contestants import EPOCHS, Course, Setting, by_hand, ours, replay_by_hand, theirs
from relay import Relay

SETTING = Setting("mlp", (1, 8, 8), batch=4, steps=4)


@pytest.mark.parametrize(
    "experiences, contestants",
    [
        (1, (by_hand, partial(ours, expression="naive"), partial(ours, expression="naive", logs=True))),
        (2, (replay_by_hand, partial(ours, expression="er", experience=1))),
    ],
    ids=["plain", "replay"],
)
def test_loops_that_take_turns_end_with_the_weights_of_the_loop_by_hand(experiences, contestants):
    course = Course(SETTING, experiences=experiences, shuffle=True)
    starts = [contestant(course) for contestant in contestants]
    assert all(seconds > 0 for seconds in Relay([start.go for start in starts], leg=3).race())
    reference, *others = (start.weights() for start in starts)
    assert not all(torch.equal(a, b) for a, b in zip(reference, course.plain().state_dict().values(), strict=True))
    for weights in others:
        torch.testing.assert_close(weights, reference)


def test_avalanches_loop_takes_turns_with_ours():
    course = Course(SETTING, experiences=1, shuffle=False)
    starts = [ours(course, "naive"), theirs(course, "Naive", metrics="none")]
    assert len(Relay([start.go for start in starts], leg=1).race()) == 2
    torch.testing.assert_close(starts[0].weights(), starts[1].weights())
    assert starts[0].strategy.clock.train_iterations == EPOCHS * SETTING.steps


def test_an_error_in_one_loop_ends_the_race():
    def fail() -> int:
        raise ValueError("no step")

    course = Course(SETTING, experiences=1, shuffle=True)
    with pytest.raises(ValueError, match="no step"):
        Relay([ours(course, "naive").go, fail], leg=1).race()
