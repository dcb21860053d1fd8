"""What the docs import is there; what is public is listed, documented and typed."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import grade_lightning
from grade_lightning.modules import TrainableModule

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def imports(page: Path) -> list[tuple[str, str]]:
    """Module and name of everything of ours that the Python blocks of a page import."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("grade_lightning"):
                found += [(node.module, alias.name) for alias in node.names]
    return found


IMPORTS = sorted({pair for page in PAGES for pair in imports(page)})


def test_the_docs_do_import_something() -> None:
    assert len(IMPORTS) > 10


@pytest.mark.parametrize(("module", "name"), IMPORTS, ids=lambda value: value)
def test_what_the_docs_import_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_the_public_names_are_listed_and_no_others() -> None:
    public = {
        name
        for name, value in vars(grade_lightning).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(grade_lightning.__all__) == sorted(public)
    assert len(set(grade_lightning.__all__)) == len(grade_lightning.__all__)


@pytest.mark.parametrize("name", grade_lightning.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(grade_lightning, name))


def test_every_method_is_public() -> None:
    methods = vars(importlib.import_module("grade_lightning.methods"))
    found = {name for name, value in methods.items() if isinstance(value, type) and not name.startswith("_")}
    assert found <= set(grade_lightning.__all__)
    assert all(issubclass(methods[name], TrainableModule) for name in found)


@pytest.mark.slow
def test_a_new_file_is_a_new_method(tmp_path: Path) -> None:
    """Without a line anywhere else: the command line and the contract test look into the package's namespace."""
    shutil.copytree(
        ROOT / "grade_lightning", tmp_path / "grade_lightning", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "grade_lightning" / "methods" / "extra.py").write_text(
        "from grade_lightning.modules import PreferenceModule\n\n\n"
        'class Extra(PreferenceModule):\n    """One more."""\n'
    )
    code = "import grade_lightning.methods as m; print(m.__file__, m.Extra)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (
        f"{tmp_path}/grade_lightning/methods/__init__.py <class 'grade_lightning.methods.extra.Extra'>" in done.stdout
    )
