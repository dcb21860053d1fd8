"""The site: built strictly, whole without a network; what is in its navigation."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
SET = {"GRADE_OFFLINE", "GRADE_REPOSITORY", "GRADE_SITE"}  # by who deploys
OPTIONS = "--push --allow-empty"  # mike takes a site that has not changed for an error
MADE = {"changelog.md", "contributing.md"}  # of documents of the top level
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:)?//", re.IGNORECASE)


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def settings() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text().replace("!ENV", ""))
    return read


def navigation() -> list[str]:
    return pages(settings()["nav"])


def test_every_page_has_one_place_in_the_navigation() -> None:
    found = [page for page in navigation() if not page.startswith("reference/")]
    folder = ROOT / "docs"
    paths = [*folder.rglob("*.md"), *(path.with_suffix(".md") for path in folder.rglob("*.ipynb"))]
    written = {path.relative_to(folder).as_posix() for path in paths}
    assert sorted(found) == sorted(written | MADE)


def test_every_package_has_a_page_of_the_reference() -> None:
    packages = {path.parent.name for path in (ROOT / "grade_lightning").glob("*/__init__.py")}
    assert {f"reference/{name}.md" for name in packages | {"index", "options", "stages", "basics"}} == {
        page for page in navigation() if page.startswith("reference/")
    }


def deployed(reference: str, folder: Path, known: bool = True) -> tuple[int, list[str], str]:
    """Exit status of `.ci/deploy`, what it asked mike for, and what it said."""
    stand_in, asked = folder / "mike", folder / "asked"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> "{asked}"\n[ "$1" != list ] || exit {int(not known)}\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(ROOT / ".ci" / "deploy"), reference]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, asked.read_text().splitlines() if asked.exists() else [], done.stderr


def test_main_is_the_version_dev(tmp_path: Path) -> None:
    assert deployed("main", tmp_path)[:2] == (0, [f"deploy {OPTIONS} dev", "list latest"])


def test_before_the_first_release_dev_is_the_default(tmp_path: Path) -> None:
    status, asked, _ = deployed("main", tmp_path, known=False)
    assert (status, asked[-1]) == (0, f"set-default {OPTIONS} dev")


def test_a_release_is_a_version_and_the_latest(tmp_path: Path) -> None:
    asked = [f"deploy {OPTIONS} --update-aliases 1.20 latest", f"set-default {OPTIONS} latest"]
    assert deployed("v1.20.3", tmp_path)[:2] == (0, asked)


@pytest.mark.parametrize("reference", ["", "feature", "v1.2", "v1.2.3rc1", "1.2.3"])
def test_what_is_no_release_has_no_version(reference: str, tmp_path: Path) -> None:
    status, asked, said = deployed(reference, tmp_path)
    assert (status, asked) == (1, [])
    assert f"'{reference}'" in said
    assert len(said.splitlines()) == 1


def test_the_site_has_a_menu_of_versions_and_a_push_deploys() -> None:
    assert settings()["extra"]["version"]["provider"] == "mike"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text())
    assert workflow[True]["push"]["branches"] == ["main"]  # YAML reads the key `on` as a truth
    build, deploy = workflow["jobs"]["build"], workflow["jobs"]["deploy"]
    assert [step["run"] for step in build["steps"] if "run" in step] == [".ci/site"]
    assert "permissions" not in build
    assert "if" not in build
    assert deploy["needs"] == "build"
    assert deploy["if"] == "github.event_name == 'push'"
    assert deploy["permissions"] == {"contents": "write"}
    assert '.ci/deploy "$GITHUB_REF_NAME"' in deploy["steps"][-1]["run"]


@pytest.mark.parametrize("script", ["run", "site"])
def test_the_gate_builds_the_site_strictly(script: str) -> None:
    """Aloud: `--quiet` drops the warnings before `--strict` counts them."""
    (command,) = re.findall(r"\bmkdocs build .*", (ROOT / ".ci" / script).read_text())
    assert "--strict" in command
    assert not re.search(r"\s(-q|--quiet)\b", command)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("material", "mkdocstrings"))), reason="needs the extra docs")
def test_the_site_is_built_strictly_and_asks_for_nothing_elsewhere(tmp_path: Path) -> None:
    """Strictly: a link, an anchor or a name in a docstring that leads nowhere is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {name: value for name, value in os.environ.items() if name not in SET}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    site = tmp_path / "site"
    found = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in navigation()} <= set(found)
    assert [name for name, text in found.items() if LOADED.search(text)] == []
    assert (site / "search" / "search_index.js").is_file()
    assert 'id="grade_lightning.methods.grade_ste.GradeSTE"' in found["reference/methods.html"]
    assert "code/tests/methods/test_grade_ste.py.html" in found["start.html"]
    assert (site / "code" / "tests" / "methods" / "test_grade_ste.py.html").is_file()
    assert ":class:" not in found["reference/modules.html"]
    tutorial = found["tutorials/1_first_alignment.html"]
    assert '<div class="language-text highlight">' in found["methods/rloo.html"]  # breaks on a phone: assets/site.css
    assert '<div class="language-text highlight">' not in tutorial
    assert "data:image/png;base64," in tutorial
    assert 'href="2_your_own_reward.html"' in tutorial
    assert (site / "tutorials" / "1_first_alignment.ipynb").is_file()
