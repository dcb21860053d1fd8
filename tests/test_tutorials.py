"""The tutorials: what is stored in them, and that they run; `docs/tutorials/execute.py` executes them anew."""

import ast
import builtins
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import grade_lightning
from grade_lightning.bundled import prepare

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|Users|work|mnt|opt|usr|var|private)/|[A-Z]:\\\\")
CLAIMS = {
    "1_first_alignment": """
assert abs(before["val/kl"]) < 1e-5 < after["val/kl"]
assert after["val/reward"] > before["val/reward"] + 0.2
assert Path("aligned/config.json").is_file()
""",
    "2_your_own_reward": """
assert rloo_log["val/reward"].iloc[-1] > rloo_log["val/reward"].iloc[0] + 0.2
assert after["val/rewards/mentions_music"] > before["val/rewards/mentions_music"] + 0.2
""",
    "3_your_own_method": """
assert after > before + 0.15
assert same == {"RankedReinforce": True, "RLOO": False}
""",
    "4_reward_model_from_pairs": """
assert trained["val/accuracy"] > max(0.8, untrained["val/accuracy"] + 0.1)
gained = {name: after[name] - before[name] for name in names}
assert gained["val/reward"] > max(0.1, gained["val/rewards/grammar_positive"])
""",
    "5_compare_methods": """
assert set(shown["method"]) == {"GradeSTE", "RLOO"} and (shown["seeds"] == 3).all()
assert "highest mean test reward" in verdict
""",
    "6_noise_of_your_own_module": """
middles = [value for value in middle if value == value]
assert max(middles[-3:]) > 2 * middles[0]
assert 1.5 < first[64] / first[256] < 3 and 1.5 < first[256] / first[1024] < 3
assert passive.metrics["grad/relative_std"] > 0
""",
    "7_from_trl": """
converted = from_trl("GRPO", config)
assert (converted.options["model"], converted.options["model.kl.beta"]) == ("GRPO", 0.04)
assert set(converted.left) == {"warmup_steps", "use_liger_kernel"}
""",
}
"""What each shows, in its own names."""


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def sources(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path, kind)]


def names(tree: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def test_each_shows_something() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(CLAIMS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_from_the_first_cell_to_the_last(path: Path) -> None:
    notebook, code = json.loads(path.read_text()), cells(path, "code")
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert [
        output for output in outputs(path) if output["output_type"] == "error" or output.get("name") == "stderr"
    ] == []
    for cell in code:
        text = "".join(cell["source"])
        *_, last = ast.parse(text).body
        shows = isinstance(last, ast.Expr) and not text.endswith(";") and ".fit(" not in text.splitlines()[-1]
        assert cell["outputs"] or not shows or ".save_pretrained(" in text, text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_of_no_machine(path: Path) -> None:
    assert path.stat().st_size < 150_000
    assert not MACHINE_PATH.search(re.sub(r'"image/png": "[^"]*"', "", path.read_text()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_imports_of_ours_is_public(path: Path) -> None:
    nodes = [node for text in sources(path, "code") for node in ast.walk(ast.parse(text))]
    found = [
        (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("grade_lightning")
        for alias in node.names
    ]
    assert found
    for module, name in found:
        assert not any(part.startswith("_") for part in (*module.split("."), name))
        assert hasattr(importlib.import_module(module), name)
        assert module != "grade_lightning" or name in grade_lightning.__all__


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_its_code_is_formatted(command: list[str]) -> None:
    call = [sys.executable, "-m", "ruff", *command, "docs/tutorials"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "index.md"], ids=lambda path: path.stem)
def test_its_links_lead_somewhere(path: Path) -> None:
    text = path.read_text() if path.suffix == ".md" else "\n".join(sources(path, "markdown"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert [link for link in links if "://" not in link and not (FOLDER / link).is_file()] == []


def test_every_tutorial_is_listed_and_has_its_page() -> None:
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (FOLDER / "index.md").read_text())
    assert listed == [path.stem for path in NOTEBOOKS]
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text().replace("!ENV", ""))
    (pages,) = [part["Tutorials"] for part in site["nav"] if "Tutorials" in part]
    assert pages == ["tutorials/index.md", *(f"tutorials/{name}.md" for name in listed)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_claimed_of_it_has_names_of_its_own(path: Path) -> None:
    """Told here in a moment, where the claim itself takes minutes."""
    made = names(ast.parse("\n".join(sources(path, "code"))), ast.Store)
    claim = ast.parse(CLAIMS[path.stem])
    known = made | names(claim, ast.Store) | set(vars(builtins)) | {"Path", "from_trl"}  # imported
    assert names(claim, ast.Load) <= known


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_says(path: Path, tmp_path: Path) -> None:
    """Its cells as a program, in a process and a folder of its own."""
    program = "\n".join(["from pathlib import Path", *sources(path, "code"), CLAIMS[path.stem]])
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    packages = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"MPLBACKEND": "Agg", "PATH": commands, "PYTHONPATH": packages}
    prepare()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
