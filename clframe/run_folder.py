"""The folder of a run.

::

    runs/<experiment>/<strategy>-seed<n>-<time>/
      config.yaml  environment.json     resolved config; versions, git revision, machine
      checkpoints/                      the last two experiences, and the last two steps saved inside one
      log.txt                           one line per experience
      metrics.csv  results.json  ledger.json
      tensorboard/  figures/
      lock                              only while a process writes to it

Earlier versions called the folder ``<time>-seed<n>``. No name has a meaning: everything is read from the files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from clframe.environment import environment
from clframe.errors import RunFolderError
from clframe.files import check_contained, is_temporary, read_json, remove_temporaries, write_atomically

SWEEP_RECORDS = ".sweep"
"""Folder with the records of a sweep, in the folder with its runs; see :mod:`clframe.sweep.cells`."""
SELECTION = "selection"
"""Folder of a sweep with the runs of a selection, on validation data; reports of the sweep leave them out."""
DEVELOPMENT = "(development run)"
"""End of the name of a development run in its results."""
RESULTS_SCHEMA: Final = 2
"""Of results.json. Raised when a field is removed or changes its meaning; a new field with a default does not."""
LONGEST_LABEL = 80
"""Characters of a strategy's label; file systems allow 255 bytes for the whole name."""
_STAMP = re.compile(r"\d{8}-\d{6}")


def strategy_label(strategy: str, *, plugins: Sequence[str] = ()) -> str:
    """Return the names in a strategy's expression, joined by ``+``, as a part of a folder's name.

    Options are left out, and characters that are not safe in names of files are replaced.

    Args:
        strategy: The expression.
        plugins: Names of Avalanche plugins that run next to it.

    >>> strategy_label("er(memory=50, at=(1, 2)) + exits")
    'er+exits'
    >>> strategy_label("naive", plugins=["LwFPlugin"]), strategy_label("my strategy/2")
    ('naive+LwFPlugin', 'my_strategy_2')
    """
    depth, plain = 0, ""
    for character in re.sub(r"'[^']*'|\"[^\"]*\"", "", strategy):  # texts, which may have parentheses
        depth += (character == "(") - (character == ")")
        plain += character if depth == 0 and character != ")" else ""
    names = [re.sub(r"[^\w.-]+", "_", name.strip()) for name in (*plain.split("+"), *plugins)]
    return "+".join(filter(None, names))[:LONGEST_LABEL]


def started_at(path: Path) -> str:
    """Return the time in the name of a run folder, which sorts by age; empty where the name has none.

    >>> [started_at(Path(name)) for name in ("er-seed0-20261129-171500", "20261129-171500-seed0", "mine")]
    ['20261129-171500', '20261129-171500', '']
    """
    found = _STAMP.findall(path.name)
    return found[-1] if found else ""


class RunFolder:
    """Creates, opens, locks and writes the folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @classmethod
    def create(cls, output: Path, *, name: str, seed: int, label: str = "") -> RunFolder:
        """Create a folder ``output/name/<label>-seed<n>-<time>``.

        Args:
            output: Folder for all run folders.
            name: Name of the experiment.
            seed: Of the run.
            label: See :func:`strategy_label`; empty leaves it out.

        Raises:
            RunFolderError: ``output`` cannot be written; no folder is left behind.
        """
        stem = f"{label}-seed{seed}" if label else f"seed{seed}"
        stem += time.strftime("-%Y%m%d-%H%M%S")
        endings = itertools.chain([""], (f"-{attempt}" for attempt in itertools.count(1)))
        while True:
            folder = cls(output / name / f"{stem}{next(endings)}")
            path = folder.path
            try:
                folder._made = [part for part in (path, *path.parents) if not os.path.lexists(part)]
                for parent in reversed(folder._made[1:]):  # os.makedirs recurses, once for each folder
                    with contextlib.suppress(FileExistsError):  # a run that starts at the same time
                        parent.mkdir()
                try:
                    path.mkdir()
                except FileExistsError:  # another run of the same second
                    continue
                (path / "checkpoints").mkdir()
                write_atomically(path / "environment.json", json.dumps(environment(), indent=2) + "\n")
                return folder
            except OSError as error:
                folder.discard()
                dangling = [p for p in path.parents if os.path.islink(p) and not os.path.exists(p)]
                reason = f"{dangling[0]} is a link to a folder that does not exist" if dangling else error.strerror
                raise RunFolderError(
                    f"output: {_shorten(path.parent)} cannot be written ({reason}); choose another --output"
                ) from None
            except BaseException:
                folder.discard()
                raise

    @classmethod
    def create_at(cls, path: Path) -> RunFolder:
        """Create a run folder at ``path``, which :meth:`is_unused`.

        Raises:
            RunFolderError: It cannot be written.
        """
        folder = cls(path)
        folder._made = [part for part in (path, *path.parents) if not os.path.lexists(part)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
            write_atomically(path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            folder.discard()
            raise RunFolderError(
                f"folder: {_shorten(path)} cannot be written ({error.strerror}); choose another --folder"
            ) from None
        except BaseException:
            folder.discard()
            raise
        return folder

    @staticmethod
    def is_unused(path: Path) -> bool:
        """Whether ``path`` is free for a new run: missing, empty, or left by a run that was killed before it began.

        Raises:
            RunFolderError: A file, or a folder that cannot be listed.
        """
        if not os.path.lexists(path):
            return True
        try:
            names = {entry.name for entry in path.iterdir() if not is_temporary(entry.name)}
            return names <= {"checkpoints", "environment.json", "lock"} and not any((path / "checkpoints").glob("*"))
        except OSError as error:
            reason = error.strerror
        raise RunFolderError(f"folder: {_shorten(path)} cannot be listed ({reason}); give another")

    def is_locked(self) -> bool:
        """Whether a process writes to the folder."""
        try:
            import fcntl

            handle = os.open(self.path / "lock", os.O_RDONLY)
        except (ImportError, OSError):  # no lock file; on Windows runs are not locked
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
        finally:
            os.close(handle)
        return False

    @classmethod
    def open(cls, path: Path, *, where: str = "resume") -> RunFolder:
        """Open the folder of an earlier run.

        Raises:
            RunFolderError: There is none, it has no config, or links lead out of it.
        """
        if not path.is_dir():
            raise RunFolderError(f"{where}: no folder {path}; give the run folder that a run printed")
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{where}: {path} has no config.yaml; give the folder of a run, not one above it")
        check_contained(path)
        return cls(path)

    def discard(self) -> None:
        """Remove this folder, after a run could not start, and the folders above it that were created for it."""
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # another run may be in it by now
                folder.rmdir()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to the folder at the same time.

        The operating system releases the lock of a process that ends, however it ends; the file only names it.

        Raises:
            RunFolderError: Another process has it, or the folder cannot be written.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows, where runs are not locked
            yield
            return
        path = self.path / "lock"
        handle = _open_locked(path, lambda file: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
        try:
            try:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
            except OSError as error:
                self.discard()
                raise RunFolderError(
                    f"{self.path}: cannot be written ({error.strerror}); check the free space"
                ) from None
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)

    def prepare_resume(self) -> None:
        """Delete what killed writes have left behind, and restore the folder of checkpoints if it is missing.

        Raises:
            RunFolderError: The folder cannot be written.
        """
        for folder in (self.path, self.path / "tensorboard", self.path / "figures"):
            remove_temporaries(folder)
        checkpoints = self.path / "checkpoints"
        try:
            checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{checkpoints}: cannot be created ({error.strerror}); check the folder") from None
        remove_temporaries(checkpoints)

    def write_config(self, text: str) -> None:
        """Write the resolved config."""
        write_atomically(self.config_path, text)

    def mean_prediction_macs(self) -> float | None:
        """Return the mean MACs of a prediction at the end of the run, as recorded in ledger.json.

        None where unknown, or where every prediction costs the same.
        """
        costs = self.prediction_costs()
        mean, whole = costs.get("mean"), costs.get("whole")
        return float(mean) if isinstance(mean, (int, float)) and whole is not None and round(mean) != whole else None

    def prediction_costs(self) -> dict[str, Any]:
        """Return the costs of a prediction at the end of the run, as recorded in ledger.json.

        Empty without a ledger, or with one of an earlier version.
        """
        try:
            costs = read_json(self.path / "ledger.json")["totals"]["prediction"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(costs) if isinstance(costs, dict) else {}


def _open_locked(path: Path, lock: Callable[[int], None]) -> int:
    """Open and lock a file; returns its handle.

    Raises:
        RunFolderError: Another process has the lock, or the file cannot be written.
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"{path.parent}: cannot be written ({error.strerror}); copy the run to a folder that can"
            ) from None
        try:
            lock(handle)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace").split()
            os.close(handle)
            pid, host = [*owner, "?", "?"][:2]
            if host == socket.gethostname() and pid.isdigit() and not is_alive(int(pid)):
                # Data-loading workers inherit the lock and outlive a killed run for a few seconds.
                path.unlink(missing_ok=True)
                continue
            raise RunFolderError(
                f"{path.parent}: process {pid} on {host} is writing to it; wait for it or stop it"
            ) from None
        except OSError:  # a file system without locks
            return handle
        # The process before may have deleted the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _shorten(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"
