"""Runs that take turns every few optimizer steps, so that whatever slows the machine slows all alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torch.optim.optimizer import register_optimizer_step_post_hook

from clframe.process_state import _claims


class Relay:
    """Threads of which one runs at a time; after every ``leg`` optimizer steps the next one does.

    The hook that passes the turn is called once a step in every run, for well under a microsecond.

    Args:
        runs: Each returns the number of steps it took.
        leg: Optimizer steps of a turn.
    """

    def __init__(self, runs: Sequence[Callable[[], int]], *, leg: int) -> None:
        self._runs, self._leg = runs, leg
        self._turns = [threading.Semaphore(0) for _ in runs]
        self._left = list(range(len(runs)))
        self._number: dict[int, int] = {}
        self._steps = [0] * len(runs)
        self._seconds = [0.0] * len(runs)
        self._errors: list[BaseException] = []

    def race(self) -> list[float]:
        """Processor seconds a step of each run."""
        threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(self._runs))]
        hook = register_optimizer_step_post_hook(self._after_step)
        try:
            for thread in threads:
                thread.start()
            self._turns[0].release()
            for thread in threads:
                thread.join()
        finally:
            hook.remove()
        if self._errors:
            raise self._errors[0]
        return self._seconds

    def _run(self, number: int) -> None:
        self._number[threading.get_ident()] = number
        self._turns[number].acquire()
        try:
            begin = time.thread_time()
            steps = self._runs[number]()
            self._seconds[number] = (time.thread_time() - begin) / steps
        except BaseException as error:
            self._errors.append(error)
        following = self._next(number)
        self._left.remove(number)
        if following != number:
            self._turns[following].release()

    def _next(self, number: int) -> int:
        place = self._left.index(number) + 1
        return self._left[place % len(self._left)]

    def _after_step(self, *_: object) -> None:
        number = self._number.get(threading.get_ident())
        if number is None:
            return
        self._steps[number] += 1
        if self._steps[number] % self._leg == 0 and len(self._left) > 1:
            # clframe refuses a thread that trains while another one does. Here the others wait, so they may.
            training = list(_claims)
            _claims.clear()
            self._turns[self._next(number)].release()
            self._turns[number].acquire()
            _claims[:] = training
