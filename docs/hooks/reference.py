"""The pages of the API: one for each package, with a directive of mkdocstrings for each file of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "grade_lightning"
STAGES = ("advantages", "budget", "columns", "constraints", "corrections", "curvature", "entropy_control")
STAGES += ("estimators", "gates", "kl", "levels", "memory", "schedules", "selection", "stateful", "terms")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write the pages."""
    packages = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    single = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    pages = {name: _page(name, [f"{name}.{module}" for module in _modules(name)]) for name in packages}
    pages["stages"] = _page("stages", [name for name in single if name in STAGES], STAGES_TEXT)
    pages["basics"] = _page("basics", [name for name in single if name not in STAGES], BASICS_TEXT)
    pages["index"] = _index(packages)
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


STAGES_TEXT = "The parts that a method is made of, one idea a file."
BASICS_TEXT = "What all packages use: errors, files, processes, numbers, strategies."


def _modules(package: str) -> list[str]:
    return sorted(path.stem for path in (PACKAGE / package).glob("*.py") if path.stem != "__init__")


def _page(name: str, modules: list[str], text: str = "") -> str:
    if not text:
        text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
    parts = [f"# {name}", text]
    for module in modules:
        parts += [f"## {module.rpartition('.')[2]} {{ #file-{module.replace('.', '-')} }}"]
        parts += [f"::: grade_lightning.{module}\n    options:\n      show_root_heading: false\n      heading_level: 3"]
    return "\n\n".join(parts) + "\n"


def _index(packages: list[str]) -> str:
    """Every public name, with the first line of what it says of itself."""
    lines = ["# Public names", "What `from grade_lightning import …` gives. Further names are in the packages:"]
    lines += [", ".join(f"[{name}]({name}.md)" for name in (*packages, "stages", "basics")) + "."]
    lines += ["| name | what |\n|---|---|\n" + "\n".join(_rows())]
    return "\n\n".join(lines) + "\n"


def _rows() -> Iterator[str]:
    where = {}
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(("grade_lightning", *file.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                said = (ast.get_docstring(node) or "").split("\n\n")[0]
                where[node.name] = f"{module}.{node.name}", " ".join(said.split()).replace("|", "\\|")
    for name in _public():
        path, said = where[name]
        yield f"| [`{name}`][{path}] | {said} |"


def _public() -> list[str]:
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []
