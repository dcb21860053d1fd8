"""One training run of a comparison: where it lies, what it left, and who is at it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@dataclass(frozen=True)
class Run:
    """One training run of a comparison, and where it lies."""

    out: Path
    method: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """As the command line knows it."""
        return f"{self.method}/{self.setting}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        """Its own."""
        return self.out / "runs" / self.method / self.setting / f"seed_{self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it left when it was trained."""
        return read_json(self.folder / "run.json")

    @property
    def tested(self) -> bool:
        """Whether the test split was measured, or there is nothing to measure."""
        return bool((self.result or {}).get("diverged")) or read_json(self.folder / "test.json") is not None

    @contextmanager
    def claimed(self, patience: float = 0) -> Iterator[bool]:
        """Whether this process alone is at it; given up when the process ends, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / "lock").acquire(timeout=patience)
        except Timeout:
            yield False
        else:
            with lock:
                yield True

    @property
    def held(self) -> bool:
        """Whether a process is at it."""
        with self.claimed() as ours:
            return not ours


def read_json(path: Path) -> dict[str, Any] | None:
    """None where nothing is that could be read; a machine that loses power may leave such."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
