"""Errors that a user can act on.

Every error is one line: ``<where>: <what was found>; <what to do>``. The command line prints it and exits with code 2;
from Python, errors are ordinary :class:`ValueError` subclasses. Checks that do not depend on each other are run by
:class:`Problems`, which reports all of them, one line each.
"""

from __future__ import annotations

import contextlib
import difflib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path


class ClframeError(ValueError):
    """Bad input. The message names the key or file, what was found and what to do."""


class ConfigError(ClframeError):
    """A configuration key, override or option that is unknown, mistyped or out of range."""


class ConfigErrors(ConfigError):
    """Several independent problems of one config.

    Args:
        problems: At least two errors.

    Attributes:
        problems: The errors, in the order in which they were found; the message has one line for each.
    """

    def __init__(self, problems: Iterable[ClframeError]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def reword(error: ClframeError, change: Callable[[str], str]) -> ClframeError:
    """Return an error of the same kind with another message; of several problems each has its message changed.

    >>> both = ConfigErrors([ConfigError("lr: found -1"), DataError("path: found nothing")])
    >>> str(reword(both, lambda message: f"a.yaml: {message}")).splitlines()
    ['a.yaml: lr: found -1', 'a.yaml: path: found nothing']
    """
    if isinstance(error, ConfigErrors):
        return ConfigErrors(reword(problem, change) for problem in error.problems)
    return type(error)(change(str(error)))


class UnknownNameError(ClframeError):
    """A name without a registry entry, file or option."""


class ComposeError(ClframeError):
    """Components that cannot be combined in one strategy."""


class DataError(ClframeError):
    """Data that is missing, damaged or unfit for the requested protocol."""


class RunFolderError(ClframeError):
    """A run folder that cannot be written, read or resumed."""


class DivergenceError(ClframeError):
    """Training with losses or weights that became NaN or infinite."""


class DistributedError(ClframeError):
    """Processes that train one model together and no longer can."""


class UnsupportedError(ClframeError):
    """Something that this engine, version or machine cannot do; the message gives the reason."""


class Interrupted(KeyboardInterrupt):
    """A run stopped by the user or by a signal.

    Args:
        folder: The run folder.
        plugins: Names of its Avalanche plugins, whose state checkpoints do not contain.
        options: Options that the command that resumes it needs too.

    Attributes:
        folder: The run folder.
        advice: How to go on: ``clframe run --resume``, or a new run where plugins prevent that.
    """

    def __init__(self, folder: Path, *, plugins: str = "", options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.advice = f"resume with {shlex.join(['clframe', 'run', '--resume', str(folder), *options])}"
        if plugins:
            self.advice = (
                f"it cannot be resumed, as checkpoints lack the state of its Avalanche plugins ({plugins}); start over "
                f"with clframe run {shlex.quote(str(folder / 'config.yaml'))}"
            )
        super().__init__(f"interrupted; {self.advice}")


class Problems:
    """Collects the errors of independent checks.

    >>> problems = Problems()
    >>> for key in ("lr", "seed"):
    ...     with problems.attempt():
    ...         raise ConfigError(f"{key}: found nothing; give a number")
    >>> [str(problem) for problem in problems.found]
    ['lr: found nothing; give a number', 'seed: found nothing; give a number']
    """

    def __init__(self) -> None:
        self.found: list[ClframeError] = []

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run a check; its error is kept, and the code after the block continues."""
        try:
            yield
        except ClframeError as error:
            self.add(error)

    def add(self, error: ClframeError) -> None:
        """Keep an error, unless one with the same message has been found."""
        found = error.problems if isinstance(error, ConfigErrors) else (error,)
        messages = {str(one) for one in self.found}
        self.found += [one for one in found if str(one) not in messages]

    def raise_found(self) -> None:
        """Raise what was found: a single error as it is, several as :class:`ConfigErrors`; nothing if there is none."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ConfigErrors(self.found)


def reason_of(error: BaseException, *, most: int | None = None) -> str:
    r"""Return the message of an error in one line, or the name of its class if it has none.

    Args:
        error: Any error, such as one of a library or of foreign code.
        most: Most characters.

    >>> reason_of(ValueError("two\n  lines")), reason_of(KeyboardInterrupt())
    ('two lines', 'KeyboardInterrupt')
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None if none is close; a single letter is close to none.

    Upper and lower case are the same.

    >>> nearest("lwff", ["er", "lwf"]), nearest("LwF", ["er", "lwf"])
    ('lwf', 'lwf')
    >>> nearest("zzz", ["er", "lwf"]) is None
    True
    """
    spelled = {one.casefold(): one for one in reversed(list(known))}  # the first one of several
    matches = difflib.get_close_matches(name.casefold(), list(spelled), n=1, cutoff=0.5) if len(name) > 1 else []
    return spelled[matches[0]] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "") -> str:
    """Message for an unknown name: the name, the nearest known name, all known names.

    >>> unknown_name("component", "lwff", ["er", "lwf"])
    "unknown component 'lwff'; did you mean 'lwf'? (known: er, lwf)"
    """
    names = sorted(known)
    close = nearest(str(name), names)
    advice = f"did you mean '{close}'?" if close else "nothing is close to it"
    prefix = f"{where}: " if where else ""
    return f"{prefix}unknown {kind} '{name}'; {advice} (known: {', '.join(names) or 'none'})"
