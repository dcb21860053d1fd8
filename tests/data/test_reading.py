"""From a source to rows."""

from typing import Any

from datasets import Dataset, DatasetDict

from grade_lightning.data import InMemory, Source, TextDataModule
from grade_lightning.data.reading import Reading

QUESTIONS = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(40)]
SIZES: dict[str, Any] = {"prompt_size": 20, "val_size": 5, "test_size": 5}


def test_the_data_module_maps_then_transforms_then_makes_conversations() -> None:
    def shout(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "prompt": row["prompt"] + "!", "solution": row.pop("answer").split()[-1]}

    source = InMemory(QUESTIONS)
    data = TextDataModule(source, columns={"prompt": "question"}, transform=shout, system_prompt="Count.", **SIZES)
    data.setup()
    row = data.splits["prompts"][0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    first = int(row["question"].split("+")[0])
    assert row["prompt"][1]["content"] == f"{first}+{first}?!"
    assert row["solution"] == str(2 * first)


def test_a_source_of_the_users_own_is_mapped_too() -> None:
    class Mine(Source):
        def load(self) -> DatasetDict:
            return DatasetDict(train=Dataset.from_list(QUESTIONS))

    assert Reading({"prompt": "question"})(Mine())["train"]["prompt"][0] == "0+0?"
    assert Reading()(Mine())["train"].column_names == ["question", "answer"]
