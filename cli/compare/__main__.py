"""`python -m grade_lightning_cli.compare` is `grade-compare`."""

import sys

from .main import compare

sys.argv[0] = "grade-compare"  # what an error begins with
compare()
