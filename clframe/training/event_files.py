"""Rewrites the event files of a resumed run without the points that it logs again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The imports below are ignored by the type checker because TensorBoard ships no types.

PATTERN = "events.out.tfevents.*"


def merge_events(folder: Path, keeps: Callable[[str, int], bool]) -> tuple[str, ...]:
    """Merge the event files of ``folder`` into one of the points where ``keeps(tag, step)``; returns their tags.

    Of points with the same tag and step the last one is kept. The new file starts with an event that makes open pages
    drop earlier points of this run, so that none is shown twice. It is complete before the old files are deleted: a
    process killed in between leaves both, which read the same. Without event files nothing happens.
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
                    points.pop((value.tag, event.step), None)  # keeps the order of writing
                    points[value.tag, event.step] = point
    wait_for_next_second(folder)
    now = time.time()
    head = Event(wall_time=now, file_version="brain.Event:2")
    forget = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
    # No host name starts with a dash, so that of the files of one second this one is read first.
    target = folder / f"events.out.tfevents.{int(now):010d}.-.kept"
    # Not read as an event file, and deleted as a temporary one when the run is resumed after a kill.
    hidden = folder / f".{target.name.replace('tfevents', 'rewritten')}.{os.getpid()}.tmp"
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


def wait_for_next_second(folder: Path) -> None:
    """Sleep, at most a second, until a new event file sorts after those in ``folder``.

    TensorBoard reads files in the order of their names, ``events.out.tfevents.<second>...``.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob(PATTERN)]
    if f"{int(time.time()):010d}" in seconds:
        time.sleep(1.0 - time.time() % 1.0)


def _events(path: Path) -> Iterator[Any]:
    """Yield the events of a file, without a last one that a kill has cut short."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    records = RawEventFileLoader(str(path)).Load()
    while True:
        try:
            record = next(records, None)
        except (MemoryError, OverflowError):  # a damaged record that claims more bytes than there are
            return
        if record is None:
            return
        yield Event.FromString(record)
