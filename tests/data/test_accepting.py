"""What is taken for rows."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from grade_lightning.data import TextDataModule
from grade_lightning.data.accepting import as_source
from grade_lightning.errors import InputError


def test_what_is_a_source(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    table = Dataset.from_list(rows)
    conversation = [{"role": "user", "content": "one"}]
    for given in (rows, table, DatasetDict(train=table, test=table), tmp_path / "rows.txt"):
        assert len(as_source(given).load()["train"]) == 2
    assert set(as_source(DatasetDict(train=table, test=table)).load()) == {"train", "test"}
    assert as_source(None, [conversation]).load()["train"][0]["prompt"] == conversation
    for wrong, message in ((3, "int is not a source"), (DatasetDict(valid=table), "without 'train' .it has valid.")):
        with pytest.raises(InputError, match=message):
            as_source(wrong)
    with pytest.raises(InputError, match="both source and prompts"):
        TextDataModule(source=rows, prompts=["one"])
    with pytest.raises(InputError, match="put it into a list"):
        TextDataModule(prompts="one")  # type: ignore[arg-type]
