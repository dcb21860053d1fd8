"""A small model folder."""

from tests.methods.conftest import folder  # noqa: F401
