"""Which reviews of a training file does no split use? A second judge may learn from those.

python benchmarks/unused.py imdb_train.parquet imdb_test.parquet judge.parquet
"""

import re
import sys

from datasets import load_dataset

from grade_lightning.data import LocalFiles, TextDataModule


def words(text: str) -> list[str]:
    """Of a review, without marks and capitals."""
    return re.sub(r"<br\s*/?>|\W", " ", text).lower().split()


def main(train: str, test: str, output: str) -> None:
    """Write the rows that share neither text nor first eight words with a split."""
    data = TextDataModule(LocalFiles(train=train, test=test), test_size=512)
    data.setup()
    used = [words(row["text"]) for split in data.splits.values() for row in split]
    openings = {tuple(text[:8]) for text in used}
    rows = load_dataset("parquet", data_files=train)["train"]
    left = rows.filter(lambda row: tuple(words(row["text"])[:8]) not in openings, load_from_cache_file=False)
    print(f"{len(rows)} rows, {len(used)} in splits, {len(left)} left")
    left.to_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
