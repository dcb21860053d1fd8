"""How long prompts may be, where nobody says it."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from grade_lightning.data import TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO
from grade_lightning.policies import Policy
from grade_lightning.rewards import FunctionReward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_tokenizer
from tests.data.test_datamodule import Rows, make_trainer


def lengths(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def fit(folder: Path, table: dict[str, list[Any]], new: int, **options: Any) -> TextDataModule:
    """One step of a policy whose context is 64 tokens."""
    module = RLOO(
        policy=Policy.from_model(make_model(), make_tokenizer()),
        reward=FunctionReward(lengths),
        sampler=Sampler(max_new_tokens=new),
        num_generations=2,
    )
    data = TextDataModule(Rows(table), batch_size=4, **options)
    trainer = make_trainer(folder, max_steps=1, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    return data


def words(n: int, count: int) -> list[str]:
    return [f"w{3 + i % 9} w{3 + i // 9 % 9} w{3 + i // 81} " + "w2 " * (count - 3) for i in range(n)]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_longest_of_the_data(tmp_path: Path) -> None:
    data = fit(tmp_path, {"prompt": [*words(30, 5), *words(40, 9)[30:]]}, new=8)
    assert data.max_prompt_tokens == 10  # with the token between texts


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_openings_are_cut_where_the_context_ends(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"100% of 'prompt from text' \(\d+ of \d+ rows\) are longer than 24 tokens"):
        data = fit(tmp_path, {"text": words(40, 30)}, new=40)
    assert data.max_prompt_tokens == 24


def test_a_prompt_for_which_the_context_has_no_room(tmp_path: Path) -> None:
    table = {"prompt": [*words(39, 5), *words(40, 30)[39:]]}
    with pytest.raises(
        InputError, match=r"column 'prompt', row 39 \(.*31 tokens; .* room for 24 beside a completion; lower --model"
    ):
        fit(tmp_path, table, new=40)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*cut.*")
        assert fit(tmp_path, table, new=33).max_prompt_tokens == 31


def test_completions_that_leave_no_room(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"context is 64 tokens, but prompts may have 2 "):
        fit(tmp_path, {"text": words(40, 5)}, new=64)
