"""Errors made for the person who reads them."""


class InputError(ValueError):
    """What the user gave cannot work: one line that names the file or field, what is wrong, and what to do.

    The command line prints it without a traceback and exits with status 2.

    Example:
        >>> raise InputError("reviews.csv: no column 'text'; rename one of: id, body")
        Traceback (most recent call last):
        ...
        grade_lightning.errors.InputError: reviews.csv: no column 'text'; rename one of: id, body
    """
