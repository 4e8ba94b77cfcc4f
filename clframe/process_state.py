"""State that a process has once: the random generators of Python, numpy and torch, and who may set them.

Training with a seed sets these generators, and building a network draws from them. :func:`own_process` restores them
at the end, so that a search by random numbers around ``clframe.run`` draws new ones, and refuses a second thread while
one trains: both would draw from the same generators, and neither would repeat itself.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from clframe.errors import UnsupportedError


@contextmanager
def own_process(what: str, *, trains: bool) -> Iterator[None]:
    """Use the process alone, in torch's :func:`default_modes`, and restore its generators at the end.

    May be entered again by the same thread, as by a callback of a run that loads another one.

    Args:
        what: What is done, for messages.
        trains: Whether it may take long: other threads are then refused. Otherwise they wait until it has finished.

    Raises:
        UnsupportedError: Another thread trains.
    """
    with _claim(what, trains=trains), preserve_generators(), default_modes():
        yield


@contextmanager
def default_modes() -> Iterator[None]:
    """Use the modes that torch starts with, whatever the caller's: gradients, float32, and the CPU for new tensors.

    >>> with torch.no_grad(), default_modes():
    ...     torch.is_grad_enabled()
    True
    """
    dtype = torch.get_default_dtype()
    # A new tensor says it: get_default_device of torch 2.6 ignores ``with torch.device(...)``.
    on_cpu = nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), on_cpu:
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def require_gradients(what: str) -> None:
    """Raise UnsupportedError where torch's modes exclude training.

    Args:
        what: What is done, for the message.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise UnsupportedError(
            f"{what}: found gradients switched off, as inside torch.no_grad() or torch.inference_mode(); call it "
            f"outside of that block"
        )


class _Claim(NamedTuple):
    thread: int
    what: str
    trains: bool


_claims: list[_Claim] = []
"""Of one thread, the outer ones first."""

_changed = threading.Condition()


@contextmanager
def _claim(what: str, *, trains: bool) -> Iterator[None]:
    thread = threading.get_ident()
    with _changed:
        while _claims and _claims[0].thread != thread:
            training = next((claim.what for claim in _claims if claim.trains), None)
            if training is not None:
                raise UnsupportedError(
                    f"{what}: another thread of this process trains ({training}) and draws from the same random "
                    f"generators; wait until it has finished, or use another process"
                )
            _changed.wait()
        _claims.append(_Claim(thread, what, trains))
    try:
        yield
    finally:
        with _changed:
            _claims.pop()
            _changed.notify_all()


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch, on every device, at the end.

    >>> before = torch.get_rng_state()
    >>> with preserve_generators():
    ...     torch.manual_seed(3).initial_seed()
    3
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    states = _States()
    try:
        yield
    finally:
        states.restore()


class _States:
    """The present states of all global generators."""

    def __init__(self) -> None:
        self._python, self._arrays, self._host = random.getstate(), np.random.get_state(), torch.get_rng_state()
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if on_cuda else None
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Set the generators to these states."""
        random.setstate(self._python)
        np.random.set_state(self._arrays)
        torch.set_rng_state(self._host)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        elif torch.cuda.is_available():
            # Nothing had been drawn on a GPU: its generators were to start with the seed of that of the CPU.
            torch.cuda.manual_seed_all(torch.initial_seed())
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


class RandomStreams:
    """Global generators of a training in several parts, such as calls of ``strategy.train``.

    Each part continues with the states that the one before has left, and the caller's are restored after each.
    """

    def __init__(self) -> None:
        self._own: _States | None = None
        self._callers: _States | None = None

    def enter(self) -> None:
        """Begin a part; without effect inside one, also one that has ended by an error before :meth:`leave`."""
        if self._callers is not None:
            return
        self._callers = _States()
        if self._own is not None:
            self._own.restore()

    def leave(self) -> None:
        """End a part."""
        if self._callers is not None:
            self._own = _States()
            self._callers.restore()
            self._callers = None

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Run a part while no other thread trains; inside ``clframe.run``, which does the same, change nothing.

        Raises:
            UnsupportedError: Another thread trains.
        """
        with _claim(what, trains=True):
            if len(_claims) > 1 or self._callers is not None:
                yield
                return
            self.enter()
            try:
                yield
            finally:
                self.leave()
