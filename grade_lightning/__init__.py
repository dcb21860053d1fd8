"""Align language models through their sampled tokens (GRADE-STE), as Lightning modules."""

__version__ = "0.1.0"
