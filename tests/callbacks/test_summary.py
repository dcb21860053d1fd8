"""The table at the end of a run."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from grade_lightning.callbacks import Summary
from tests.callbacks.runs import judged_by, ones, rows, trainer


def printed(summary: Summary, where: dict[str, str]) -> str:
    text = io.StringIO()
    summary.print(where, Console(file=text, width=160))
    return text.getvalue()


def test_a_summary_of_nothing(tmp_path: Path) -> None:
    summary = Summary()
    assert summary.last_step is None
    assert printed(summary, {"logs": "runs/here"}) == "logs: runs/here\n"


def test_a_summary_of_one_measurement(tmp_path: Path) -> None:
    """As at the end of a run that went on: there is nothing to compare it with."""
    summary = Summary()
    trainer(tmp_path, summary).validate(judged_by(ones), rows(1), verbose=False)
    text = printed(summary, {})
    assert summary.last_step == 0
    assert "before" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("│ reward ")]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["reward", "1.000"]


def test_a_summary_shows_texts_as_they_are(tmp_path: Path) -> None:
    """Square brackets are not rich's markup."""

    def bracket(ids: Any, **_: Any) -> list[str]:
        return ["[bold]loud[/bold] [/nothing]" for _ in ids]

    judged = judged_by(ones)
    judged.tokenizer.batch_decode = bracket  # type: ignore[method-assign, assignment]
    summary = Summary(completions=1)
    trainer(tmp_path, summary).validate(judged, rows(1), verbose=False)
    assert "[bold]loud[/bold]" in printed(summary, {})


def test_paths_are_not_markup() -> None:
    assert printed(Summary(), {"logs": "runs/[a]/b"}) == "logs: runs/[a]/b\n"
