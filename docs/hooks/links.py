"""Links out of `docs/`: documents of the top level become pages, and so does each file of code that a page links to.

With a `repo_url` links to code lead to the repository instead.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCUMENTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)((?:#[^)\s]*)?)(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".sbatch": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside of `docs/`."""
    texts = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in DOCUMENTS.items()}
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    texts |= {file.src_uri: file.content_string for file in files.documentation_pages() if file.generated_by is None}
    linked = {target for page, text in texts.items() for target in _outside(page, text)}
    for target in sorted(linked) if not config.repo_url else []:
        files.append(File.generated(config, f"code/{target}.md", content=_code(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    del files
    own = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        target = _target(own, match[1])
        if target is None:
            return match[0]
        if target in DOCUMENTS or target.startswith("docs/"):
            there = DOCUMENTS.get(target) or target.removeprefix("docs/")
        elif config.repo_url:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{config.repo_url.rstrip('/')}/{kind}/main/{target}{match[2]}"
        else:
            there = f"code/{target}.md"
        return relpath(there, PurePosixPath(own).parent) + match[2]

    parts = FENCE.split(markdown)
    return "".join(part if index % 2 else LINK.sub(rewritten, part) for index, part in enumerate(parts))


def _target(page: str, link: str) -> str | None:
    """What a page links to, from the top level; None if that is on the site as it stands."""
    folder = "" if page in DOCUMENTS.values() else f"docs/{PurePosixPath(page).parent}"
    target = normpath(f"{folder}/{link}".lstrip("/"))
    return None if target.startswith("docs/") and folder else target


def _outside(page: str, text: str) -> set[str]:
    """The files of code that a page links to."""
    prose = "".join(FENCE.split(text)[::2])
    targets = {_target(page, match[1]) for match in LINK.finditer(prose)} - {None} - set(DOCUMENTS)
    return {target for target in targets if target is not None and not target.startswith("docs/")}


def _code(path: Path) -> str:
    """A page that shows a file, or what is in a folder."""
    name = path.relative_to(ROOT).as_posix()
    front = "---\nsearch:\n  exclude: true\n---\n"
    if path.is_dir():
        listed = sorted(inner.name for inner in path.iterdir() if not inner.name.startswith(("__", ".")))
        return f"{front}\n# {name}\n\n" + "\n".join(f"- `{inner}`" for inner in listed) + "\n"
    if not path.is_file():
        raise PluginError(f"{name}: a page of the docs links to it, and it is not there")
    text = path.read_text(encoding="utf-8").rstrip()
    return f"{front}\n# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
