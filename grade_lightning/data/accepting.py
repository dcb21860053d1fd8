"""What is accepted where rows are meant."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset

from grade_lightning.data.sources import BundledReviews, HubDataset, InMemory, LocalFiles, Source
from grade_lightning.errors import InputError
from grade_lightning.policies.chat import Prompt

if TYPE_CHECKING:
    SourceLike: TypeAlias = Source | Dataset | DatasetDict | IterableDataset | Sequence[Mapping[str, Any]] | str | Path
    """A source, rows in memory, a file or folder, or the name of a dataset of the Hub."""
else:  # the command line makes sources
    SourceLike = Source


def as_source(value: "SourceLike | None", prompts: Sequence[Prompt] | None = None) -> Source:
    """The source that is meant; the bundled reviews by default.

    Args:
        value: what was given.
        prompts: given instead.

    Raises:
        InputError: it is no source, or both are given.

    Example:
        >>> as_source(None, ["Once upon"]).load()["train"][0]
        {'prompt': 'Once upon'}
        >>> type(as_source("stanfordnlp/imdb")).__name__
        'HubDataset'
    """
    if prompts is not None:
        if value is not None:
            raise InputError("data: both source and prompts are given; give one of them")
        if isinstance(prompts, str):
            raise InputError("data.prompts: a text is not a list of prompts; put it into a list")
        return InMemory([{"prompt": prompt} for prompt in prompts])
    if isinstance(value, Source):
        return value
    if isinstance(value, str | Path):
        return LocalFiles(str(value)) if Path(value).exists() else HubDataset(str(value))
    if isinstance(value, DatasetDict):
        if "train" not in value:
            raise InputError(f"data.source: a DatasetDict without 'train' (it has {', '.join(value)}); rename a split")
        return InMemory(value["train"], value.get("test"))
    if value is None:
        return BundledReviews()
    if isinstance(value, Dataset | IterableDataset | Sequence):
        return InMemory(value)
    raise InputError(
        f"data.source: {type(value).__name__} is not a source; give a Source, a dataset, a list of rows, a file, a "
        "folder or the name of a dataset of the Hub"
    )
