"""Sampling by a vLLM server, asked over HTTP."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from grade_lightning.errors import InputError, check_range
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.waiting import in_background, wait_for

from .assembling import Answer, assembled, bare
from .distribution import Distribution
from .engine import Engine
from .vllm import sampling_settings


class VLLMServer(Engine):
    """Sampling by a server of vLLM, of one process; weights go through a folder that both can read.

    It is started with `VLLM_SERVER_DEV_MODE=1`, which opens the addresses for weights to everyone who reaches the
    server (let it listen to this machine alone), `--logprobs-mode processed_logprobs` and `--generation-config vllm`.
    Before each rollout the policy, with its adapters added, is written to the folder, and the server reads it.

    Args:
        base_url: where it listens, without `/v1`.
        folder: for the weights; a temporary one by default, for a server on the same machine.
        timeout: seconds that an answer may take.

    References:
        Efficient Memory Management for Large Language Model Serving with PagedAttention (Kwon et al., 2023),
        https://arxiv.org/abs/2309.06180
    """

    def __init__(
        self, base_url: str = "http://127.0.0.1:8000", folder: Path | None = None, timeout: float = 600.0
    ) -> None:
        check_range("(0, inf)", "engine", timeout=timeout)
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise InputError("engine.base_url: must be like http://127.0.0.1:8000, without user, password or key")
        self.base_url = base_url.rstrip("/")
        self.folder = folder
        self.timeout = timeout

    def sync(self, policy: Policy, step: int) -> None:
        """Write the weights to the folder, and let the server read them.

        Raises:
            InputError: there are several processes, or the server does not take the weights.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise InputError("VLLMServer serves one process; take the VLLMEngine, of which each process has its own")
        folder = Path(tempfile.mkdtemp(prefix="grade-weights-", dir=self.folder))
        try:
            with _silently():
                policy.save_pretrained(folder)
            hand_over = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            wait_for(self._gather([("/collective_rpc", hand_over), ("/reset_prefix_cache", {})], at_once=False))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """Sample one completion for each prompt, each with a seed from the global random state.

        Raises:
            InputError: the server fails, is late, or answers something else than it was asked for.
        """
        return self.start(policy, distribution, prompts)()

    def start(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Callable[[], Rollout]:
        """Ask the server; what is returned waits for its answers, and raises what :meth:`generate` does."""
        settings = sampling_settings(distribution, policy.eos_ids) | {"return_token_ids": True}
        del settings["detokenize"]  # a server has no such option
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        asked = [
            ("/v1/completions", {"prompt": ids, "seed": seed} | settings)
            for ids, seed in zip(bare(prompts), seeds, strict=True)
        ]
        answers = in_background(self._gather(asked, at_once=True))

        def waited_for() -> Rollout:
            found = [self._answer(answer) for answer in answers.result()]
            return assembled(type(self).__name__, policy, distribution, prompts, found)

        return waited_for

    def _answer(self, found: Any) -> Answer:
        try:
            choice = found["choices"][0]
            return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        except (KeyError, IndexError, TypeError) as error:
            raise self._error(f"its answer has no {error}", "use vLLM 0.32") from error

    async def _gather(self, asked: list[tuple[str, dict[str, Any]]], at_once: bool) -> list[Any]:
        limit = aiohttp.ClientTimeout(total=self.timeout)
        async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
            if not at_once:
                return [await self._post(session, *each) for each in asked]
            tasks = [asyncio.ensure_future(self._post(session, *each)) for each in asked]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # of the others nothing is wanted where one failed
                    task.cancel()

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Any:
        try:
            async with session.post(self.base_url + path, json=body, allow_redirects=False) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise self._error(f"{path}: status {response.status}: {' '.join(text.split())[:200]}", _LOG)
                return await response.json(content_type=None) if text else None
        except asyncio.TimeoutError as error:
            raise self._error(f"{path}: no answer within {self.timeout:g} s", "raise engine.timeout") from error
        except aiohttp.ClientError as error:
            raise self._error(f"{path}: no connection ({type(error).__name__})", "start the server") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise self._error(f"{path}: answers what is no JSON", "check engine.base_url") from error

    def _error(self, what: str, advice: str) -> InputError:
        return InputError(f"VLLMServer {self.base_url}: {what}; {advice}; the run resumes with --ckpt_path")


_LOG = "look at the server's own log"


@contextmanager
def _silently() -> Iterator[None]:
    """Without a bar for each file that transformers writes."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
