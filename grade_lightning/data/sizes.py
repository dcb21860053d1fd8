"""Sizes of the splits: the paper's, and smaller ones for a smaller table."""

from collections.abc import Callable, Collection, Mapping

from grade_lightning.data.texts import Splits

USUAL = {"test": 2_000, "validation": 2_000, "prompts": 10_000, "reward": 5_000}
"""The paper's."""


def shrunk(sizes: Mapping[str, int], free: Collection[str], rows: int) -> dict[str, int] | None:
    """Make sizes fit so many rows: those that are free in proportion, each at least 1; None where they cannot.

    Example:
        >>> shrunk({"validation": 2, "prompts": 10, "reward": 5}, {"prompts", "reward"}, 11)
        {'validation': 2, 'prompts': 5, 'reward': 3}
    """
    left = rows - sum(size for name, size in sizes.items() if name not in free)
    whole = sum(sizes[name] for name in free)
    if left < len(free):
        return None
    more = left - len(free)
    return {name: 1 + more * size // whole if name in free else size for name, size in sizes.items()}


def split_to_fit(
    split: Callable[[Mapping[str, int]], Splits], sizes: Mapping[str, int], free: Collection[str]
) -> tuple[Splits, dict[str, int]]:
    """Split with these sizes, or with smaller ones if the rows run out and the free sizes can be made to fit.

    Args:
        split: how rows are split; it gives less where they run out.
        sizes: the wanted sizes.
        free: of them those that nobody gave.

    Returns:
        The splits, and the sizes that were asked for at last.
    """
    wanted, asked = dict(sizes), dict(sizes)
    while True:
        found = split(asked)
        rows = sum(len(found.rows[name]) for name in asked)
        smaller = shrunk(wanted, free, rows) if free and rows < sum(asked.values()) else None
        if smaller is None:
            return found, asked if rows == sum(asked.values()) else wanted
        asked = smaller  # its sum is `rows` at most, so that it ends
