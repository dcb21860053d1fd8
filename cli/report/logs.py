"""The scalars in a run's TensorBoard logs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub import errors  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New  # type: ignore[import-untyped]

from .runs import Curve

Points = dict[str, dict[int, tuple[float, float]]]
"""Time and value of each scalar at each step."""


def event_files(folder: Path) -> list[Path]:
    """What TensorBoard reads, in the order of time."""
    return sorted(path for path in folder.glob("events.out.tfevents*") if path.is_file())


def scalars(folder: Path, missing: list[str]) -> dict[str, Curve]:
    """All scalars of a run; of several values at a step the first counts.

    Where the run went on, what had been logged from that step on is dropped, as TensorBoard does, and the time that
    passed since the last record that is kept.
    """
    points: Points = {}
    began, pause = math.inf, 0.0
    files = event_files(folder)
    for path in files:
        before, again = _until(points, math.inf), False
        reader, records = PyRecordReader_New(str(path)), 0
        while True:
            try:
                reader.GetNext()
                event = Event.FromString(reader.record())
            except errors.OutOfRangeError:
                break
            except (errors.DataLossError, DecodeError):
                missing.append(f"{path}: cut off or damaged after {records} records; what follows is left out.")
                break
            records += 1
            if event.session_log.status == SessionLog.START:
                points, again = _until(points, event.step), True
                last = max((time for by_step in points.values() for time, _ in by_step.values()), default=math.inf)
                began, pause = (began, event.wall_time - last) if points else (math.inf, 0.0)
            logged = [value for value in event.summary.value if value.HasField("simple_value")]
            if not again and any(_contradicts(before, event.step, value) for value in logged):
                missing.append(f"{path}: of another training than the files before it; left out.")
                points = before
                break
            for value in logged:
                time = event.wall_time - pause
                began = min(began, time)
                points.setdefault(value.tag, {}).setdefault(event.step, (time, value.simple_value))
    if not points:
        missing.append(f"{folder}: {'empty TensorBoard logs' if files else 'no TensorBoard logs'}.")
    curves = {}
    for name, by_step in points.items():
        steps = sorted(by_step)
        times, values = np.array([by_step[step] for step in steps], float).T
        curves[name] = Curve(np.array(steps, float), values, times - began)
    return curves


def _contradicts(points: Points, step: int, value: Any) -> bool:
    """Whether something else was logged there; the same again is what one training may leave in two files."""
    there = points.get(value.tag, {}).get(step)
    return there is not None and not np.array_equal(there[1], value.simple_value, equal_nan=True)


def _until(points: Points, step: float) -> Points:
    """A copy of what was logged before a step."""
    kept = {name: {s: p for s, p in by_step.items() if s < step} for name, by_step in points.items()}
    return {name: by_step for name, by_step in kept.items() if by_step}
