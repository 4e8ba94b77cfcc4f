"""Event files of a run that goes on: what it writes again is taken out, what stays is kept as it was written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# TensorBoard ships no types, which is what the ignored imports below are about.

PATTERN = "events.out.tfevents.*"


def keep(folder: Path, keeps: Callable[[str, int], bool]) -> tuple[str, ...]:
    """Make one event file of those in ``folder``, of the points only that ``keeps(tag, step)``; returns their tags.

    Of points with the same tag and step the last one stays. The new file begins by telling readers to forget what
    they have read of this run, so that a page that is open shows no point twice either, and is there before the old
    ones go: whoever is killed in between leaves both, which reads the same. Nothing happens where there are no files.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    paths = sorted(folder.glob(PATTERN))
    if not paths:
        return ()
    points: dict[tuple[str, int], Any] = {}
    for path in paths:
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                points = {place: point for place, point in points.items() if place[1] < event.step}
            for value in event.summary.value:
                if keeps(value.tag, event.step):
                    point = Event(wall_time=event.wall_time, step=event.step)
                    point.summary.value.append(value)
                    points.pop((value.tag, event.step), None)  # a point that was written again is as new as that
                    points[value.tag, event.step] = point
    let_a_second_pass(folder)
    now = time.time()
    head = Event(wall_time=now, file_version="brain.Event:2")
    forget = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
    # No host's name begins with a dash: of the files of one second this one is read first.
    target = folder / f"events.out.tfevents.{int(now):010d}.-.kept"
    hidden = folder / f".{target.name.replace('tfevents', 'rewritten')}"  # no event file to those who look for such
    with open(hidden, "wb") as file:
        writer = RecordWriter(file)
        for event in (head, forget, *points.values()):
            writer.write(event.SerializeToString())
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, target)
    for path in paths:
        path.unlink()
    return tuple(dict.fromkeys(tag for tag, _ in points))


def let_a_second_pass(folder: Path) -> None:
    """Wait, at most a second, until a new event file sorts behind those in ``folder``.

    Files are read in the order of their names, ``events.out.tfevents.<second>...``.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob(PATTERN)]
    if f"{int(time.time()):010d}" in seconds:
        time.sleep(1.0 - time.time() % 1.0)


def _events(path: Path) -> Iterator[Any]:
    """The events of a file, up to a last one that was cut short by a kill."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    for record in RawEventFileLoader(str(path)).Load():
        yield Event.FromString(record)
