"""Micro-batches: how many of the rows of a step go through the network together."""

from collections.abc import Sequence


def even_by_tokens(sizes: Sequence[int], tokens: Sequence[int], parts: int) -> list[int]:
    """How many units each part takes, in their order, so that the largest part is as small as it can be.

    The size of a part is that of its padded tensor: all its rows, times its longest sequence. Many short sequences then
    go together, and few long ones; with as many units in each, the part with the longest decides how much memory is
    needed.

    Args:
        sizes: rows of each unit.
        tokens: tokens of its longest sequence.
        parts: how many parts, none of which is empty.

    Returns:
        Units of each part.

    Example:
        >>> even_by_tokens([1] * 8, [1, 1, 2, 2, 3, 4, 6, 12], parts=3)
        [5, 2, 1]
    """
    low = max(size * length for size, length in zip(sizes, tokens, strict=True))
    high = sum(sizes) * max(tokens)
    while low < high:
        middle = (low + high) // 2
        fits = len(_filled(sizes, tokens, middle)) <= parts
        low, high = (low, middle) if fits else (middle + 1, high)
    counts = _filled(sizes, tokens, low)
    while len(counts) < parts:  # to divide a part makes none larger
        most = max(range(len(counts)), key=lambda i: counts[i])
        counts[most : most + 1] = [counts[most] - counts[most] // 2, counts[most] // 2]
    return counts


def _filled(sizes: Sequence[int], tokens: Sequence[int], budget: int) -> list[int]:
    """Units of parts that are filled one after another up to the budget, which has room for each unit by itself."""
    counts = [0]
    rows = longest = 0
    for size, length in zip(sizes, tokens, strict=True):
        rows, longest = rows + size, max(longest, length)
        if counts[-1] and rows * longest > budget:
            rows, longest = size, length
            counts.append(0)
        counts[-1] += 1
    return counts
