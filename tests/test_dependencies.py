"""The oldest version of everything that pyproject.toml admits, and the newest, each in a fresh virtual environment.

torch stays as it is: another one is gigabytes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
TORCH = torch.__version__.partition("+")[0]
IMPORT_ALL = """
import importlib, pathlib, pkgutil, grade_lightning, grade_lightning_cli.main
for module in pkgutil.walk_packages(grade_lightning.__path__, "grade_lightning."):
    importlib.import_module(module.name)
assert "site-packages" in pathlib.Path(grade_lightning.__file__).parts, grade_lightning.__file__
"""
COMMANDS, STAGES = ("main", "run", "config", "guard", "errors"), ("supervised", "reward_model")
# both sampling ways and both kinds of gradient; all commands, LoRA, resuming, and every message to a user
SMOKE = [
    ["tests/methods/test_contract.py", "-k", "(GradeSTE or RLOO) and (rises or resumed or loaded)"],
    [*(f"tests/methods/test_{name}.py" for name in STAGES), *(f"tests/cli/test_{name}.py" for name in COMMANDS)],
]


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["lora"])]


def floor(requirement: Requirement) -> str:
    """The oldest version that is admitted."""
    (version,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return TORCH if requirement.name == "torch" else version


def test_every_dependency_has_a_floor() -> None:
    assert len([floor(requirement) for requirement in requirements()]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("age", ["oldest", "newest"])
def test_the_package_works_with_the(age: str, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            args, cwd=work, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )

    source, work = tmp_path / "source", tmp_path / "work"
    for folder, names in {source: ["grade_lightning", "cli"], work: ["tests", "docs"]}.items():
        for name in names:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "setup.cfg", work)
    constraints = tmp_path / "constraints.txt"
    fixed = {r.name: floor(r) for r in requirements()} if age == "oldest" else {"torch": TORCH}
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()))

    done = call(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    assert done.returncode == 0, done.stdout + done.stderr
    if call(str(python), "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path), "filelock").returncode:
        pytest.skip("needs a package index")
    done = call(str(python), "-m", "pip", "install", "-c", str(constraints), f"{source}[lora]", "pytest", "beartype")
    assert done.returncode == 0, done.stdout + done.stderr
    done = call(str(python), "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    for tests in SMOKE:
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib -m 'not slow'"]
        done = call(str(python), "-m", "pytest", *options, *tests)
        assert done.returncode == 0, done.stdout[-20_000:]
