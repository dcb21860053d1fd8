"""Errors made for the person who reads them."""

import math


class InputError(ValueError):
    """What the user gave cannot work: one line that names the file or field, what is wrong, and what to do.

    The command line prints it without a traceback and exits with status 2.

    Example:
        >>> raise InputError("reviews.csv: no column 'text'; rename one of: id, body")
        Traceback (most recent call last):
        ...
        grade_lightning.errors.InputError: reviews.csv: no column 'text'; rename one of: id, body
    """


class DivergenceError(InputError):
    """The policy was trained into something that gives no finite numbers; other settings may not."""


def check_range(interval: str, owner: str = "", **values: float | None) -> None:
    """Check that numbers lie in an interval, written as in mathematics; None is no number.

    Args:
        interval: such as `"(0, 1]"`, above 0 and at most 1.
        owner: the part whose options they are.
        **values: the numbers by name.

    Raises:
        InputError: one does not.

    Example:
        >>> check_range("[0, 1]", gamma=1.0, lam=0.95)
        >>> check_range("(0, 1]", "sampler", top_p=0.0)
        Traceback (most recent call last):
        ...
        grade_lightning.errors.InputError: sampler.top_p = 0.0: must be above 0 and at most 1
    """
    bounds = interval[1:-1].split(", ")
    low, high = map(float, bounds)
    least, most = interval[0] == "[", interval[-1] == "]"
    said = [f"{bounds[0]} or more" if least else f"above {bounds[0]}"]
    said.append(f"at most {bounds[1]}" if most else f"below {bounds[1]}")
    for name, value in values.items():
        if value is None or low < value < high or (least and value == low) or (most and value == high):
            continue
        # an infinite bound goes without saying, until somebody reaches it
        needed = [text for text in said if "inf" not in text or not math.isfinite(value)]
        raise InputError(f"{f'{owner}.' if owner else ''}{name} = {value}: must be {' and '.join(needed)}")
