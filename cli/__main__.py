"""`python -m grade_lightning_cli` is `grade-fit`."""

from .main import fit

fit()
