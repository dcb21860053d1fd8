"""Tables of completions and histograms of rewards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.plugin_util import markdown_to_safe_html  # type: ignore[import-untyped]

from grade_lightning.callbacks import Completions
from grade_lightning.callbacks.completions import completion_table
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Turns
from tests.callbacks.runs import infinite, judged_by, nothing, ones, rows, trainer
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted, Talks


class Said(Rollout):
    """A rollout whose texts are given."""

    def __init__(self, prompts: list[str], completions: list[str]) -> None:
        self.__dict__.update(prompts=prompts, completions=completions)


def test_a_table_whatever_is_in_the_texts() -> None:
    said = Said(["a | b", "two\nlines", "| |"], ["\n\n", "c|d\r\n\te", "plain"])
    table = completion_table(said, torch.tensor([0.5, float("nan"), 1.0]), torch.tensor([0.0, 1.25, 2.0]), rows=8)
    head, rule, *body = table.splitlines()
    assert body == [
        r"| a \| b |  | 0.500 | 0.00 |",
        r"| two lines | c\|d e | nan | 1.25 |",
        r"| \| \| | plain | 1.000 | 2.00 |",
    ]
    columns = {line.replace(r"\|", "").count("|") for line in (head, rule, *body)}
    assert columns == {5}


def test_a_table_of_so_many_rows() -> None:
    said = Said(["p"] * 5, ["c"] * 5)
    assert len(completion_table(said, torch.zeros(5), torch.zeros(5), rows=3).splitlines()) == 5
    assert len(completion_table(said, torch.zeros(5), torch.zeros(5), rows=9).splitlines()) == 7


@pytest.mark.parametrize(("function", "histogram"), [(ones, True), (nothing, False), (infinite, False)])
def test_completions_of_a_reward_without_a_number(function: Any, histogram: bool, tmp_path: Path) -> None:
    """Its rows are shown; there is nothing to put into a histogram."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, Completions(), logger=logger).validate(judged_by(function), rows(), verbose=False)
    logger.experiment.flush()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    tags = found.Tags()
    assert tags["tensors"] == ["val/completions/text_summary"]
    assert tags["histograms"] == (["val/rewards"] if histogram else [])


def test_completions_need_no_tensorboard(tmp_path: Path) -> None:
    trainer(tmp_path, Completions()).validate(judged_by(ones), rows(), verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_table_says_who_speaks() -> None:
    """Each text begins a line of its cell, and its stars are not taken for Markdown."""
    prompts = Prompts.of(make_prompts((3,)) | {"columns": {"begins": [True]}})
    rollout = Turns(Talks, max_turns=2, engine=Scripted()).generate(make_policy(), Distribution(), prompts)
    table = completion_table(rollout, torch.zeros(1), torch.zeros(1), rows=8)
    said = "**environment:** w9<br>**policy:** w6<br>**environment:** w4 w5<br>**policy:** w6 w6"
    assert f"| {said} | 0.000 | 0.00 |" in table
    starred = Said(["2*3*4"], ["<calc>2*3*4_5_</calc>"])
    page = markdown_to_safe_html(completion_table(starred, torch.zeros(1), torch.zeros(1), rows=1))
    assert "<td>2*3*4</td>" in page
    assert "<td>&lt;calc&gt;2*3*4_5_&lt;/calc&gt;</td>" in page
