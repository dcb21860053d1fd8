"""The notebooks of `docs/` as pages: their text, their code, and what they printed and drew when they were executed.

A page is Markdown, so links are checked and rewritten as those of any other page, and nothing is loaded from elsewhere.
"""

import json
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()([\w./-]+)\.ipynb(?=[)#])")
STYLE = re.compile(r'<style.*?</style>|(?<=<table) border="1" class="dataframe"', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a page beside each notebook, which itself can be downloaded."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(file.content_string)
        try:
            text = "\n\n".join(_cell(cell) for cell in notebook["cells"])
        except KeyError as error:
            raise PluginError(f"{file.src_uri}: no notebook of format 4 ({error} is missing)") from None
        title, _, rest = text.partition("\n")
        download = f'[Download the notebook]({file.name}.ipynb){{ download="" }}'
        page = File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=f"{title}\n\n{download}\n{rest}")
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a link to a notebook lead to its page."""
    del config, files
    return markdown if page.file.generated_by else LINK.sub(r"\1.md", markdown)


def _cell(cell: dict[str, Any]) -> str:
    source = _text(cell["source"])
    if cell["cell_type"] == "markdown":
        return LINK.sub(r"\1.md", source)
    return "\n\n".join([_fenced(source.removesuffix(";"), "python"), *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    """The richest form that a page can show."""
    if output["output_type"] == "stream":
        return _fenced(_text(output["text"]))
    data = output["data"]
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{_text(data["image/png"]).strip()}">'
    if "text/html" in data:  # a table of pandas, in the site's style; without blank lines, which would end it
        plain = STYLE.sub("", _text(data["text/html"]))
        return "".join(line.strip() for line in plain.splitlines())
    return _fenced(_text(data["text/plain"]))


def _fenced(text: str, language: str = "output") -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
