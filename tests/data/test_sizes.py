from typing import Any

import pytest

from grade_lightning.data import TextDataModule
from grade_lightning.data.sizes import shrunk
from grade_lightning.errors import InputError
from tests.data.test_datamodule import Rows, labelled, preferences, ready

NONE: dict[str, Any] = {"reward_size": None, "prompt_size": None, "val_size": None}


def sizes(data: TextDataModule) -> dict[str, int]:
    return {name: len(rows) for name, rows in data.splits.items()}


@pytest.mark.parametrize("rows", [4, 5, 19, 100, 18_999])
def test_shrunk_sizes_are_in_proportion_and_fit(rows: int) -> None:
    usual = {"test": 2_000, "validation": 2_000, "prompts": 10_000, "reward": 5_000}
    found = shrunk(usual, list(usual), rows)
    assert found is not None
    assert rows - 4 <= sum(found.values()) <= rows
    assert all(abs(found[name] - size * rows / 19_000) < 3 for name, size in usual.items())  # each has one first


def test_no_size_below_one() -> None:
    assert shrunk({"validation": 2_000, "prompts": 10_000}, {"validation", "prompts"}, 1) is None
    assert shrunk({"validation": 50, "prompts": 10_000}, {"prompts"}, 50) is None


def test_usual_sizes_shrink_to_a_small_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = ready(Rows(labelled(190)), **NONE)
    assert sizes(data) == {"test": 20, "validation": 20, "prompts": 98, "reward": 49}
    said = [line for line in caplog.messages if "shrink" in line]
    assert len(said) == 1
    assert "190 train rows" in said[0]
    assert "98 of 10000 for data.prompt_size" in said[0]


def test_given_sizes_stay_and_the_others_shrink() -> None:
    data = ready(Rows(labelled(100), labelled(9, 100)), **NONE | {"val_size": 40})
    assert sizes(data) == {"test": 9, "validation": 40, "prompts": 39, "reward": 20}
    with pytest.raises(InputError, match=r"100 of 100 train rows .* but 15200 are asked for; lower .*val_size \(200\)"):
        ready(Rows(labelled(100), labelled(9, 100)), **NONE | {"val_size": 200})


def test_fewer_rows_than_splits_ask_for_more_rows() -> None:
    with pytest.raises(InputError, match=r"^data\.source: 2 of 2 train rows .* the splits need 4 at least; add rows$"):
        ready(Rows(labelled(2)), **NONE)


def test_shared_prompts_leave_less_and_still_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = ready(Rows(preferences(120, each=4)), "pairs", **NONE)
    found = sizes(data)
    assert found["reward"] == 0
    (said,) = [line for line in caplog.messages if "shrink" in line]
    assert "for data.val_size" in said
    assert "reward_size" not in said  # nothing was asked for
    assert found["prompts"] > found["validation"] >= 1 <= found["test"]
    prompts = [set(rows["prompt"]) for rows in data.splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
