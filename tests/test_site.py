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
MADE = {"changelog.md", "contributing.md"}  # of documents of the top level
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:)?//", re.IGNORECASE)


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def navigation() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text().replace("!ENV", "")
    return pages(yaml.safe_load(text)["nav"])


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


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("material", "mkdocstrings"))), reason="needs the extra docs")
def test_the_site_is_built_strictly_and_asks_for_nothing_elsewhere(tmp_path: Path) -> None:
    """Strictly: a link, an anchor or a name in a docstring that leads nowhere is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {name: value for name, value in os.environ.items() if name != "GRADE_REPOSITORY"}
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
    assert "data:image/png;base64," in tutorial
    assert 'href="2_your_own_reward.html"' in tutorial
    assert (site / "tutorials" / "1_first_alignment.ipynb").is_file()
