"""TRL's formats, as text and as messages, become prompts with completions."""

from typing import Any

import pytest
from datasets import Dataset

from grade_lightning.data.formats import as_chat, with_prompts
from grade_lightning.data.normalise import normalise
from grade_lightning.errors import InputError

ASK = {"role": "user", "content": "2+2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4", "5"))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
TOOL = {"role": "tool", "content": "4"}


def normalised(**row: Any) -> dict[str, Any]:
    """A row through Arrow, as a file would give it."""
    found: dict[str, Any] = normalise(Dataset.from_dict({name: [value] for name, value in row.items()}), "mine")[0]
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "2+2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": "4", "rejected": "5"},
    ],
)
def test_pairs_of_messages_in_all_their_forms(row: dict[str, Any]) -> None:
    assert normalised(**row) == {"prompt": [ASK], "chosen": "4", "rejected": "5"}


def test_text_stays_text() -> None:
    row = {"prompt": "2+2?", "completion": " 4", "label": True}
    assert normalised(**row) == row | {"label": 1}


def test_messages_have_a_prompt_for_methods_that_sample() -> None:
    assert normalised(messages=[ASK, GOOD, ASK, BAD])["prompt"] == [ASK, GOOD, ASK]
    assert normalised(messages=[ASK, GOOD, ASK])["prompt"] == [ASK, GOOD, ASK]
    assert with_prompts({"messages": [[ASK, GOOD]], "prompt": ["mine"]}, "mine")["prompt"] == ["mine"]


def test_unpaired_rows() -> None:
    assert normalised(prompt=[ASK], completion=[BAD], label=False) == {"prompt": [ASK], "completion": "5", "label": 0}


def test_a_completion_of_several_messages_stays_one() -> None:
    table = with_prompts({"prompt": [[ASK]], "completion": [[ASK, CALL, TOOL, GOOD]]}, "mine")
    assert table["completion"] == [[CALL, TOOL, GOOD]]
    assert with_prompts({"prompt": [[ASK]], "completion": [[CALL]]}, "mine")["completion"] == [[CALL]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"messages": ["Hi"]}, r"mine: row 0: 'messages' is 'Hi'; write a list of role and content"),
        ({"messages": [[]]}, r"mine: row 0: 'messages' is \[\]"),
        (
            {"prompt": [[ASK]], "completion": [[ASK]]},
            r"mine: row 0: 'completion' has no message of the assistant after the prompt; let it begin with one",
        ),
        ({"prompt": [[ASK]], "completion": [[{"role": "assistant"}]]}, r"mine: row 0: 'completion' is .*role and"),
        (
            {"prompt": ["2+2?"], "chosen": [[TOOL, ASK, GOOD]], "rejected": [[BAD]]},
            r"mine: row 0: 'chosen' and 'rejected' do not follow the same prompt",
        ),
    ],
)
def test_messages_that_do_not_fit(table: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_prompts(table, "mine")


def test_chats_begin_with_the_system_prompt_once() -> None:
    system = {"role": "system", "content": "Count."}
    table: dict[str, list[Any]] = {
        "prompt": ["2+2?", [ASK], [TOOL | {"role": "system"}, ASK]],
        "answer": ["4", "4", "4"],
    }
    found = as_chat(table, "Count.")
    assert found["prompt"][:2] == [[system, ASK]] * 2
    assert found["prompt"][2][0]["content"] == "4"
    assert found["answer"] == table["answer"]
    assert as_chat(table, None)["prompt"][0] == [ASK]
