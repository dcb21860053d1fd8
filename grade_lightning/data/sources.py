"""Where the rows come from: every source gives a `datasets.DatasetDict` with TRL's columns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from grade_lightning.data.mapping import table_of
from grade_lightning.data.normalise import normalise as normalise
from grade_lightning.data.reviews import generate_reviews
from grade_lightning.data.sums import MOST, generate_sums
from grade_lightning.errors import InputError, check_range

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


class Source(ABC):
    """Gives the rows to train and to test on, with the columns that TRL uses.

    These are `text`, `messages`, `prompt`, or `prompt` with `completion` or with `chosen` and `rejected`; a `label`,
    where there is one, is 0 (negative) or 1 (positive). Further columns are kept, for reward functions. A
    source of your own implements `load` and can end it with `normalise`.
    """

    @abstractmethod
    def load(self) -> DatasetDict:
        """Read the splits "train" and, if there is one, "test"."""

    def read(self) -> DatasetDict:
        """The rows as they stand, for columns to be mapped; by default those of :meth:`load`."""
        return self.load()

    def called(self, split: str) -> str:
        """What to call a split in an error."""
        return f"data.source ({split})"

    def _normalised(self) -> DatasetDict:
        return DatasetDict({split: normalise(rows, self.called(split)) for split, rows in self.read().items()})


class BundledReviews(Source):
    """Film reviews written by the grammar of `grade_lightning.data.reviews`: nothing to download.

    Args:
        num_train: Reviews to train on; the default is a little more than the data module's splits take.
        num_test: Reviews to test on.
        seed: Another seed gives other reviews.

    Example:
        >>> reviews = BundledReviews(num_train=4, num_test=2).load()
        >>> reviews["train"]["label"][:], reviews["test"].column_names
        ([0, 1, 0, 1], ['text', 'label'])
    """

    def __init__(self, num_train: int = 18_000, num_test: int = 2_000, seed: int = 0) -> None:
        check_range("[1, inf)", "data.source", num_train=num_train)
        check_range("[0, inf)", "data.source", num_test=num_test)
        self.num_train, self.num_test, self.seed = num_train, num_test, seed

    def load(self) -> DatasetDict:
        """Write the reviews."""
        reviews = generate_reviews(self.num_train + self.num_test, self.seed)
        parts = {"train": reviews[: self.num_train], "test": reviews[self.num_train :]}
        tables = {
            split: {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
            for split, rows in parts.items()
        }
        return DatasetDict({split: Dataset.from_dict(table) for split, table in tables.items()})


class BundledSums(Source):
    r"""Sums of two to four terms, worked out by someone who often forgets to carry: `grade_lightning.data.sums`.

    Rows have `prompt`, `completion` and `answer`: `SupervisedFineTuning` learns the careless workings from them, and
    a policy gradient with `NumericMatch` learns to carry.

    Args:
        num_train: Sums to train on.
        num_test: Sums to test on, none of which is trained on.
        carries: The share of carries that the workings remember.
        seed: Another seed gives other sums.

    Example:
        >>> BundledSums(num_train=3, num_test=1).load()["test"][0]
        {'prompt': '71+9+8+0=', 'completion': '70\n78', 'answer': '88'}
    """

    def __init__(self, num_train: int = 12_000, num_test: int = 1_000, carries: float = 0.25, seed: int = 0) -> None:
        check_range("[1, inf)", "data.source", num_train=num_train)
        check_range("[0, inf)", "data.source", num_test=num_test)
        check_range("[0, 1]", "data.source", carries=carries)
        if num_train + num_test > MOST:
            raise InputError(
                f"data.source: {num_train + num_test} sums are asked for; there are {MOST}; lower num_train or num_test"
            )
        self.num_train, self.num_test, self.carries, self.seed = num_train, num_test, carries, seed

    def load(self) -> DatasetDict:
        """Write the sums."""
        sums = generate_sums(self.num_train + self.num_test, self.seed, self.carries)
        parts = {"train": sums[: self.num_train], "test": sums[self.num_train :]}
        names = ("prompt", "completion", "answer")
        tables = {split: {name: [row[name] for row in rows] for name in names} for split, rows in parts.items()}
        return DatasetDict({split: Dataset.from_dict(table) for split, table in tables.items()})


class HubDataset(Source):
    """A dataset of the Hugging Face Hub, or of its cache when `HF_HUB_OFFLINE=1`.

    Args:
        name: The dataset's name, such as "stanfordnlp/imdb".
        config: Which of its configurations; `None` for the default.
        train_split: Its split to train on.
        test_split: Its split to test on; `None` if it has none.
        max_rows: Stream so many rows of each split, and leave the rest where it is; `None` downloads all.
    """

    def __init__(
        self,
        name: str = "stanfordnlp/imdb",
        config: str | None = None,
        train_split: str = "train",
        test_split: str | None = "test",
        max_rows: int | None = None,
    ) -> None:
        check_range("[1, inf)", "data.source", max_rows=max_rows)
        self.name, self.config, self.max_rows = name, config, max_rows
        self.splits = {"train": train_split} | ({"test": test_split} if test_split else {})

    def load(self) -> DatasetDict:
        """Download the splits, or take them from the cache."""
        return self._normalised()

    def read(self) -> DatasetDict:
        """The same, with the dataset's own columns."""
        try:
            if self.max_rows is None:
                return DatasetDict(load_dataset(self.name, self.config, split=self.splits))
            streams = {
                split: load_dataset(self.name, self.config, split=own, streaming=True)
                for split, own in self.splits.items()
            }
            return DatasetDict({split: _first(rows, self.max_rows, split) for split, rows in streams.items()})
        except ConnectionError as error:
            raise InputError(
                f"data.source.name: {_line(error)}; with no network, use LocalFiles, or fill the cache with "
                "network once and then set HF_HUB_OFFLINE=1"
            ) from error
        except Exception as error:  # each builder, and each dataset, raises its own
            raise InputError(f"data.source.name: {self.name}: {_line(error)}; check name, config and splits") from error

    def called(self, split: str) -> str:
        """The dataset's name and split."""
        return f"{self.name} ({split})"


class InMemory(Source):
    """Rows of your own in memory: a list of dicts, or a `datasets.Dataset`.

    Of an `IterableDataset` the first `max_rows` rows are read, once: splits that share nothing, a seeded order and an
    exact resume need to know all rows.

    Args:
        train: Rows to train on.
        test: Rows to test on, if any.
        max_rows: The most rows to take of each.

    Example:
        >>> InMemory([{"prompt": "2 + 2 =", "answer": "4"}]).load()["train"][0]
        {'prompt': '2 + 2 =', 'answer': '4'}
    """

    def __init__(
        self,
        train: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
        test: Dataset | IterableDataset | Sequence[Mapping[str, Any]] | None = None,
        max_rows: int | None = None,
    ) -> None:
        check_range("[1, inf)", "data.source", max_rows=max_rows)
        self.rows = {"train": train} | ({} if test is None else {"test": test})
        self.max_rows = max_rows

    def load(self) -> DatasetDict:
        """Check the rows."""
        return self._normalised()

    def read(self) -> DatasetDict:
        """The rows as a table."""
        return DatasetDict({split: _first(rows, self.max_rows, split) for split, rows in self.rows.items()})


class LocalFiles(Source):
    """Your own files: parquet, csv, json, jsonl, txt (a row a line), or the unpacked aclImdb folder.

    Args:
        train: A file; or a folder with files of one format named `train*` (and, perhaps, `test*`); or a
            folder with `train/pos`, `train/neg` (and, perhaps, `test/pos`, `test/neg`), a text file a review.
        test: A file, or a folder as above. `None` takes the test split of the folder `train`, if any.
    """

    def __init__(self, train: str, test: str | None = None) -> None:
        self.train, self.test = train, test
        for split, path in (("train", train), ("test", test)):
            if path is not None and not Path(path).exists():  # known before any model is built
                raise InputError(f"data.source.{split}: {path}: no such file or folder; check the path")

    def load(self) -> DatasetDict:
        """Read the files."""
        return self._normalised()

    def read(self) -> DatasetDict:
        """The same, with their own columns."""
        splits = {"train": _read(Path(self.train), "train")}
        if self.test is not None:
            splits["test"] = _read(Path(self.test), "test")
        elif Path(self.train).is_dir() and _found(Path(self.train), "test"):
            splits["test"] = _read(Path(self.train), "test")
        return DatasetDict(splits)

    def called(self, split: str) -> str:
        """The path."""
        return f"data.source.{split}: {self.train if split == 'train' or self.test is None else self.test}"


def _first(rows: Any, most: int | None, split: str) -> Dataset:
    """So many rows of a table, a stream or a list, as a table."""
    if isinstance(rows, Dataset):
        return rows if most is None else rows.select(range(min(most, len(rows))))
    if isinstance(rows, IterableDataset) and most is None:
        raise InputError(
            f"data.source ({split}): an IterableDataset has no known end, and splits and an exact resume need one; say "
            "how many rows to read of it with max_rows"
        )
    found = list(islice(rows, most))
    if not found:
        raise InputError(f"data.source ({split}): no rows; give at least one")
    return table_of(found, f"data.source ({split})")


def _line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]


def _found(folder: Path, split: str) -> list[Path]:
    """What a folder has for a split: the two folders of aclImdb, or files."""
    tree = [folder / split / "neg", folder / split / "pos"]
    if all(part.is_dir() for part in tree):
        return tree
    return sorted(path for path in folder.glob(f"{split}*") if path.suffix.lower() in _BUILDERS)


def _read(path: Path, split: str) -> Dataset:
    field = f"data.source.{split}: {path}"
    paths = _found(path, split) if path.is_dir() else [path]
    if not paths:
        known = ", ".join(_BUILDERS)
        raise InputError(
            f"{field}: the folder has neither {split}* files ({known}) nor {split}/pos and {split}/neg; name a file"
        )
    return _read_tree(paths, field) if paths[0].is_dir() else _read_files(paths, field)


def _read_tree(folders: list[Path], field: str) -> Dataset:
    texts, labels = [], []
    for folder in folders:
        for path in sorted(folder.glob("*.txt")):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{field}: cannot read {path}: {error}; unpack the archive again") from error
            labels.append(folder.name)
    return Dataset.from_dict({"text": texts, "label": labels})


def _read_files(paths: list[Path], field: str) -> Dataset:
    suffixes = {path.suffix.lower() for path in paths}
    if len(suffixes) > 1:
        raise InputError(f"{field}: mixes {', '.join(sorted(suffixes))}; keep one format, or name one file")
    builder = _BUILDERS.get(paths[0].suffix.lower())
    if builder is None:
        raise InputError(f"{field}: unknown format {paths[0].suffix!r}; use one of {', '.join(_BUILDERS)}")
    if empty := [path for path in paths if not path.stat().st_size]:
        raise InputError(f"{field}: {empty[0].name} is empty; write it again or leave it out")
    try:
        # the Arrow copy goes to the Hugging Face cache, nothing beside the file
        rows = load_dataset(builder, data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # each builder raises its own
        if "corresponds to no data" in str(error):
            raise InputError(f"{field}: has no rows; write it again") from error
        raise InputError(f"{field}: cannot be read as {builder} ({_line(error)}); write it again") from error
    return rows.filter(lambda text: text.strip(), input_columns="text") if builder == "text" else rows
