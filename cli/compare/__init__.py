"""Several methods, everything else equal: the plan, its runs, and what was chosen."""

from .main import compare

__all__ = ["compare"]
