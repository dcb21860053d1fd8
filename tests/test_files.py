"""A file is whole, or what it was before."""

import errno
import os
from pathlib import Path

import pytest

from grade_lightning.files import write_atomically


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("what was there before, and is longer")
    assert write_atomically(path, "é\n") == path
    assert path.read_text(encoding="utf-8") == "é\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_part_is_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(path.name for path in tmp_path.iterdir()))
    write_atomically(tmp_path / "a.txt", "text")
    (name,) = seen
    assert name.startswith("a.txt.")
    assert name.endswith(f".{os.getpid()}.part")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system says it: without a name

    path = tmp_path / "a.txt"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt'$") as error:
        write_atomically(path, "after")
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("folder", "kind"), [("nowhere", FileNotFoundError), ("file", NotADirectoryError)])
def test_a_folder_that_cannot_be_names_the_file(folder: str, kind: type[OSError], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kind) as error:
        write_atomically(tmp_path / folder / "a.txt", "text")
    assert error.value.filename == str(tmp_path / folder / "a.txt")


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []
