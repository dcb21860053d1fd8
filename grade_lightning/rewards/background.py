"""An event loop in the background, for rewards that wait for something."""

import asyncio
import os
from collections.abc import Coroutine
from functools import cache
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, or what it raises.

    In a thread of its own, since a notebook has a loop in ours; a forked process has a thread of its own, too.

    Example:
        >>> async def answer():
        ...     return 42
        >>> wait_for(answer())
        42
    """
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())).result()


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop
