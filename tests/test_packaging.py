"""The package: what is in it, and that one fact is in one file."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

import grade_lightning

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
FOLDERS = sorted({path.parent for path in (ROOT / "docs").rglob("*.md")})
CODE = ("grade_lightning", "cli", "tests", "benchmarks", "configs", ".github")


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    def packages(pattern: str) -> set[str]:
        paths = [path for top in ("grade_lightning", "cli") for path in (ROOT / top).rglob(pattern)]
        return {re.sub(r"^cli\b", "grade_lightning_cli", ".".join(p.parent.relative_to(ROOT).parts)) for p in paths}

    assert sorted(packages("__init__.py")) == sorted(setup_cfg["options"]["packages"].split())
    assert packages("*.py") == packages("__init__.py")


def test_package_data_is_there(setup_cfg: configparser.ConfigParser) -> None:
    folders = {"grade_lightning": ROOT / "grade_lightning", "grade_lightning_cli": ROOT / "cli"}
    for package, names in setup_cfg["options.package_data"].items():
        assert [name for name in re.split(r"[,\s]+", names) if not (folders[package] / name).is_file()] == []


def test_one_fact_one_file(setup_cfg: configparser.ConfigParser) -> None:
    """Beside `[project]`, dependencies in setup.cfg are dropped with only a warning."""
    tables = re.findall(r"^\[([^\]]+)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {table.split(".")[1] for table in tables if table.startswith("tool.")} == {"ruff"}
    assert "install_requires" not in setup_cfg["options"]
    assert "metadata" not in setup_cfg


def links(document: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    local = [link for link in links(document) if "://" not in link]
    for link in local:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_named_are_there(document: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_pages_that_the_code_names_are_there() -> None:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".yml")]
    named = {link for path in files for link in re.findall(r"\bdocs/[\w/]+\.md(?:#[\w-]+)?", path.read_text())}
    assert named
    for page, _, anchor in (link.partition("#") for link in named):
        assert (ROOT / page).is_file(), page
        assert not anchor or anchor in anchors(ROOT / page), f"{page}#{anchor}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_page_is_in_the_index_of_its_folder(folder: Path) -> None:
    listed = {link.partition("#")[0] for link in links(folder / "index.md")}
    assert {path.name for path in folder.glob("*.md")} - {"index.md"} <= listed
    assert {f"{path.parent.name}/index.md" for path in folder.glob("*/index.md")} <= listed


def test_the_version_is_in_one_place_and_the_citation_has_it() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert version not in (ROOT / "grade_lightning" / "__init__.py").read_text()
    assert grade_lightning.__version__ in (version, "unknown")


def test_a_release_keeps_no_secret() -> None:
    """Publishing is trusted by the workflow's identity, which one job alone may show."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        workflow = yaml.safe_load(text)
        assert "secrets." not in text
        assert workflow["permissions"] == {"contents": "read"}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None, reason="needs the package build")
def test_a_wheel_of_the_sdist_works_outside_of_the_checkout(tmp_path: Path) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    source.mkdir()
    for name in ("grade_lightning", "cli"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def call(*args: str, cwd: Path, **more: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
        done = subprocess.run(
            [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), cwd=source)  # the wheel is of the sdist
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    call("-m", "pip", "install", "--no-deps", "--target", str(there), str(wheel), cwd=tmp_path)
    code = "import grade_lightning as g; from grade_lightning_cli.listing import main; print(g.__file__); main([])"
    out = call("-c", code, cwd=tmp_path, PYTHONPATH=str(there))
    assert out.startswith(str(there))
    assert "GradeSTE" in out


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None, reason="needs the package build")
def test_the_wheel_holds_two_packages_and_their_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("grade_lightning", "cli", "tests", "configs", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"grade_lightning", "grade_lightning_cli"}
    data = {"py.typed", "defaults.yaml", "report/page.html"}
    assert {"grade_lightning/py.typed", *(f"grade_lightning_cli/{name}" for name in data)} <= set(names)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grade_lightning").rglob("*.py")}
    sources |= {f"grade_lightning_cli/{p.relative_to(ROOT / 'cli').as_posix()}" for p in (ROOT / "cli").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks after an `example` mark, as they stand."""
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"<!-- example -->\n```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
    assert not list(tmp_path.iterdir())  # the reader's folder stays clean


def test_there_is_an_example() -> None:
    assert any("<!-- example -->" in path.read_text() for path in DOCUMENTS)
