"""The C library's settings: made where they can be, and never against the environment."""

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from grade_lightning import allocator
from grade_lightning.allocator import keep_freed_memory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What a C library is told that is glibc's, without anything in the environment."""
    found: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, *setting: Any) -> int:
            found.append(setting)
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(os.confstr_names, "CS_GNU_LIBC_VERSION", 2)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    return found


def test_freed_memory_is_kept(calls: list[tuple[int, int]]) -> None:
    """Nothing is mapped by itself, nothing is trimmed, and the heap grows by a lot."""
    assert keep_freed_memory()
    assert dict(calls) == {-4: 0, -1: -1, -2: allocator.PAD}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_ARENA_MAX_", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"),
    ],
)
def test_the_environment_wins(
    name: str, value: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
    assert calls == []


def test_tunables_of_other_things_are_no_matter(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=512")
    assert keep_freed_memory()
    assert calls


def fails(error: type[Exception]) -> Any:
    def confstr(name: str) -> str:
        raise error("unrecognized configuration name")

    return confstr


@pytest.mark.parametrize("missing", ["platform", "name", "value", "version"])
def test_other_systems_are_left_alone(
    missing: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS; a Python that knows no such name; musl, which does not know it; a library that calls itself something."""
    if missing == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif missing == "name":
        monkeypatch.delitem(os.confstr_names, "CS_GNU_LIBC_VERSION")
    else:
        monkeypatch.setattr(os, "confstr", fails(OSError) if missing == "value" else lambda name: None)
    assert not keep_freed_memory()
    assert calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory by /proc")
def test_a_large_block_stays_with_the_process() -> None:
    """The C library itself, in a process of its own: 64 MB that were freed are still resident afterwards."""
    program = (
        "import ctypes, mmap; from pathlib import Path; from grade_lightning.allocator import keep_freed_memory\n"
        "done, libc = keep_freed_memory(), ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "here = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * mmap.PAGESIZE\n"
        "block = libc.malloc(2**26); ctypes.memset(block, 1, 2**26); full = here(); libc.free(block)\n"
        "print(int(done), int(full - here() < 2**25))"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    results = {}
    for name, environment in {"kept": plain, "usual": plain | {"MALLOC_ARENA_MAX_": "8"}}.items():
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        results[name] = run.stdout.split()
    if results["kept"][0] == "0":
        pytest.skip("this C library is not glibc")
    assert results == {"kept": ["1", "1"], "usual": ["0", "0"]}
