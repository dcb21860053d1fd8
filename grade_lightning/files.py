"""Files that are whole or not there."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file so that a reader, a kill or a full disk never meets half of it.

    The text is written beside `path`, under a name that no other process has, and moved there once it is on the disk.

    Args:
        path: the file, in a folder that exists; what it held before is replaced.
        text: all of it.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written; what lay there before stays. The error names `path`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = write_atomically(Path(folder, "run.json"), "{}")
        ...     path.read_text(), [file.name for file in Path(folder).iterdir()]
        ('{}', ['run.json'])
    """
    with atomic(path) as file:
        file.write(text)
    return path


@contextmanager
def atomic(path: Path, mode: str = "w", part: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write, which gets its name once all is written and on the disk.

    Args:
        path: the file, in a folder that exists; what it held before is replaced.
        mode: `w` for text, `wb` for bytes.
        part: what it is called until then; a name that no other process has by default.

    Raises:
        OSError: the file cannot be written; what lay there before stays. The error names `path`.
    """
    part = part or path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # that of a full disk names no file
    finally:
        with suppress(OSError):
            part.unlink()
