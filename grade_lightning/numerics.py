"""Numbers: their width, seeds, and what a file can hold."""

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor


@contextmanager
def wide_numbers() -> Iterator[None]:
    """New tensors and quotients of integers are float32 or better; in a step of `bf16-true` they would be bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(before, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widened(values: Tensor) -> Tensor:
    """The same in float32 or better.

    Example:
        >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def hash_seed(*key: int | str) -> int:
    """A 63-bit seed from integers and names; the same on every machine.

    Example:
        >>> hash_seed(42, "train", 0) == hash_seed(42, "train", 0) != hash_seed(42, "train", 1)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global generators: torch's, and those that rewards of the user's own may draw from.

    Example:
        >>> seed_generators(7)
        >>> first = torch.rand(2)
        >>> seed_generators(7)
        >>> bool((torch.rand(2) == first).all())
        True
    """
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """What is drawn from torch's generators within leaves them as they were: the processor's and this device's.

    Example:
        >>> seed_generators(7)
        >>> with forked_generators(torch.device("cpu")):
        ...     within = torch.rand(2)
        >>> bool((torch.rand(2) == within).all())
        True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def finite_or_none(value: float) -> float | None:
    """A number as JSON can hold it.

    Example:
        >>> finite_or_none(0.5), finite_or_none(math.nan)
        (0.5, None)
    """
    return value if math.isfinite(value) else None
