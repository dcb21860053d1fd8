"""Coroutines, waited for from ordinary code."""

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(work: Coroutine[Any, Any, T]) -> "Future[T]":
    """Begin a coroutine; what is returned has its result, or what it raises, once it is done.

    In a thread of its own, since a notebook has a loop in ours; a forked process has a thread of its own, too.
    """
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, or what it raises.

    Example:
        >>> async def answer():
        ...     return 42
        >>> wait_for(answer())
        42
    """
    return in_background(work).result()


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop
