"""The bundled models are built once, and never by half. The training itself is replaced here."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from grade_lightning import bundled
from grade_lightning.bundled import prepare
from grade_lightning.policies import bundled_folder, resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADE_LIGHTNING_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def write(folder: Path) -> None:
    for name in ("policy", "reward"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_it_is_built_where_it_belongs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def build(folder: Path) -> None:
        seen.append((folder.parent, folder.name, bundled_folder().exists()))
        write(folder)

    monkeypatch.setattr(bundled, "_build", build)
    folder = prepare()
    assert folder == bundled_folder() == cache / "bundled-v1"
    assert names(cache) == {"bundled-v1"}
    assert names(folder) == {"policy", "reward"}
    ((parent, name, there),) = seen
    assert (parent, there) == (cache, False)  # on the same disk, so that renaming is one act
    assert name != "bundled-v1"
    assert resolve_model("bundled", "policy") == str(folder / "policy")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(
    error: type[BaseException], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> None:
        (folder / "policy").mkdir()
        raise error

    monkeypatch.setattr(bundled, "_build", build)
    with pytest.raises(error):
        prepare()
    assert names(cache) == set()
    monkeypatch.setattr(bundled, "_build", write)
    assert names(prepare()) == {"policy", "reward"}  # and the lock is free


def test_what_exists_is_not_touched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "bundled-v1" / "policy").mkdir(parents=True)
    (cache / "bundled-v1" / "policy" / "mine.txt").write_text("kept")
    monkeypatch.setattr(bundled, "_build", lambda folder: pytest.fail("built again"))
    assert prepare() == cache / "bundled-v1"
    assert (cache / "bundled-v1" / "policy" / "mine.txt").read_text() == "kept"
    assert {path.name for path in cache.iterdir()} == {"bundled-v1"}


def test_threads_that_start_together_build_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them finds that nothing is there before any builds."""
    together = threading.Barrier(4, timeout=30)
    built, results = [], []

    def wait_for_all() -> Path:
        folder = bundled_folder()
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            first = folder.is_dir()
            together.wait()
            assert not first
        return folder

    def build(folder: Path) -> None:
        built.append(folder)
        write(folder)

    waited: set[int] = set()
    monkeypatch.setattr(bundled, "bundled_folder", wait_for_all)
    monkeypatch.setattr(bundled, "_build", build)
    threads = [threading.Thread(target=lambda: results.append(prepare())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [cache / "bundled-v1"] * 4
    assert len(built) == 1
    assert names(cache) == {"bundled-v1"}


PROCESS = """
import sys
from pathlib import Path
from grade_lightning import bundled

def build(folder):
    with open(sys.argv[1], "a") as file:
        file.write("built\\n")
    (folder / "policy").mkdir()

bundled._build = build
print("ready", flush=True)
sys.stdin.readline()
print(bundled.prepare())
"""


@pytest.mark.slow
def test_processes_that_start_together_build_once(cache: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "log")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        answers = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            answers.append(process.communicate(timeout=60)[0].strip())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert answers == [str(cache / "bundled-v1")] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_unbuilt_models_say_how_to_build_them() -> None:
    with pytest.raises(ValueError, match=r"bundled policy model is not built: run any grade-fit command once"):
        resolve_model("bundled", "policy")
