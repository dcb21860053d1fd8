"""From a source to the rows of the data module: columns mapped, rows transformed, then checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import DatasetDict

from grade_lightning.data.mapping import Transform, rename, transform_rows
from grade_lightning.data.normalise import normalise
from grade_lightning.data.sources import Source


@dataclass(frozen=True)
class Reading:
    """What is done with a source's rows; with nothing to do they are those of its `load`."""

    columns: Mapping[str, str] = field(default_factory=dict)
    transform: Transform | None = None
    chat: bool = False
    system_prompt: str | None = None

    def __call__(self, source: Source) -> DatasetDict:
        """Read the source.

        Example:
            >>> from grade_lightning.data.sources import InMemory
            >>> Reading({"prompt": "question"}, chat=True)(InMemory([{"question": "2+2?"}]))["train"]["prompt"][0]
            [{'role': 'user', 'content': '2+2?'}]
        """
        if not self.columns and self.transform is None and not self.chat and self.system_prompt is None:
            return source.load()
        found = {}
        for split, rows in source.read().items():
            name = source.called(split)
            rows = rename(rows, self.columns, name) if self.columns else rows
            rows = transform_rows(rows, self.transform, name) if self.transform is not None else rows
            found[split] = normalise(rows, name, self.chat, self.system_prompt)
        return DatasetDict(found)
