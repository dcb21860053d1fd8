"""A client of servers that speak OpenAI's chat API, such as vLLM, SGLang, llama.cpp, or `transformers serve`."""

import asyncio
import os
from collections.abc import Sequence
from http import HTTPStatus
from random import Random
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from grade_lightning.errors import InputError, check_range

LONGEST_WAIT = 60.0
"""Seconds between two tries, at most."""


class ChatAPI:
    """Asks a server several questions at once, and again where it fails for now.

    Too many requests (429), failures of the server (5xx), no answer in time, a lost connection and what is no JSON are
    tried again, each time after twice as long, or when the server says (`Retry-After`).

    Args:
        base_url: up to `/v1`. A key in it is refused.
        key_variable: the environment variable with the key; unset: none is sent. The key is in no file and no message.
        concurrency: requests at a time.
        timeout: seconds that one may take.
        retries: how often it is tried again.
        backoff: seconds before the second try.
        owner: what messages call it.
    """

    def __init__(
        self,
        base_url: str,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        owner: str = "chat",
    ) -> None:
        check_range("[1, inf)", owner, concurrency=concurrency)
        check_range("(0, inf)", owner, timeout=timeout)
        check_range("[0, inf)", owner, retries=retries, backoff=backoff)
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            where = f"{parts.scheme}://{parts.hostname}"  # a key may be in the rest
            raise InputError(
                f"{owner}.base_url ({where}): must be like http://localhost:8000/v1, without user, password or key; "
                f"the key belongs in the environment variable {key_variable}"
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.key_variable = key_variable
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        self.owner = owner
        self._noise = Random()  # the seeded generators are for what is sampled

    async def ask(self, requests: Sequence[dict[str, Any]], retries: int | None = None) -> list[Any]:
        """What the server answers to each request, as JSON.

        Args:
            requests: bodies of requests.
            retries: other than usual.

        Raises:
            InputError: one of them fails for good.
        """
        gate = asyncio.Semaphore(self.concurrency)
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isprintable():
            raise self._error("no try", f"the environment variable {self.key_variable} has control characters in it")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit = aiohttp.ClientTimeout(total=self.timeout)
        async with aiohttp.ClientSession(
            headers=headers, timeout=limit, connector=aiohttp.TCPConnector(limit=self.concurrency)
        ) as session:

            async def one(request: dict[str, Any]) -> Any:
                async with gate:
                    return await self._persist(session, request, self.retries if retries is None else retries)

            tasks = [asyncio.ensure_future(one(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # of the others nothing is wanted where one failed
                    task.cancel()

    async def _persist(self, session: aiohttp.ClientSession, request: dict[str, Any], retries: int) -> Any:
        """Ask until there is an answer; it is `error` that ends the last try."""
        for tried in range(retries + 1):
            text = ""
            wait = min(self.backoff * 2**tried * (0.5 + self._noise.random()), LONGEST_WAIT)
            try:
                async with session.post(self.url, json=request, allow_redirects=False, proxy=self._proxy) as response:
                    text = await response.text(errors="replace")
                    if response.status == HTTPStatus.OK:
                        return await response.json(content_type=None)
                    error = self._refusal(response.status, text)
                    if response.status != HTTPStatus.TOO_MANY_REQUESTS and response.status < 500:
                        raise error
                    wait = _told(response.headers.get("Retry-After")) or wait
            except asyncio.TimeoutError:
                error = self._error(f"no answer within {self.timeout:g} s", "raise timeout, or lower concurrency")
            except aiohttp.ClientError as failure:
                error = self._error(f"no connection ({type(failure).__name__})", "start the server, or check base_url")
            except ValueError as failure:
                if isinstance(failure, InputError):
                    raise
                error = self._error(f"answers {self.quoted(text)}, which is no JSON", "check base_url")
            if tried < retries:
                await asyncio.sleep(wait)
        raise error if retries == 0 else InputError(f"{error} ({retries + 1} tries)")

    @property
    def _proxy(self) -> str | None:
        """That of the environment. aiohttp would send the passwords of a `.netrc` along with it."""
        parts = urlsplit(self.url)
        return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)

    def _refusal(self, status: int, text: str) -> InputError:
        """What a status other than 200 means."""
        phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else ""
        said = f"status {status} {phrase}".rstrip()
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):  # the text may have the key in it
            there = "refuses the key in" if os.environ.get(self.key_variable) else "wants a key, and none is in"
            return self._error(said, f"the server {there} the environment variable {self.key_variable}")
        advice = "check base_url, model and request"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            advice = "lower concurrency, or raise retries"
        elif status >= 500:
            advice = "look at the server's own log"
        return self._error(f"{said}: {self.quoted(text)}", advice)

    def _error(self, what: str, advice: str) -> InputError:
        return InputError(f"reward {self.owner}: {self.url}: {what}; {advice}")

    def quoted(self, text: str) -> str:
        """The beginning of a server's answer, without the key."""
        key = os.environ.get(self.key_variable, "").strip()
        text = text.replace(key, "***") if key else text
        return f"{' '.join(text.split())!r:.120}"


def _told(retry_after: str | None) -> float | None:
    """Seconds that a server asks for; a date is not read.

    Example:
        >>> _told("7"), _told("1000000"), _told("Wed, 21 Oct 2026 07:28:00 GMT"), _told(None)
        (7.0, 60.0, None, None)
    """
    if retry_after is None or not retry_after.isdecimal():
        return None
    return min(float(retry_after), LONGEST_WAIT)
