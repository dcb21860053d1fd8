"""Environments of the library `verifiers` 0.1, which ask the policy as they would ask a server."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from grade_lightning.errors import InputError
from grade_lightning.waiting import in_background

from .environment import Environment, Message


class VerifiersEnvironment(Environment):
    """An environment of `verifiers` 0.1, such as one of its hub: its own rollout, with the policy as its model.

    The rows are the environment's: `load_environment(name).get_dataset()`, with `prompt`, `answer` and the rest. The
    rubric's reward is the last turn's. A conversation that a limit of `Turns` ends is scored as one whose prompt has
    become too long. Calls of tools that a server would have parsed are not: the policy's turn is a plain text. Needs
    `verifiers>=0.1.14,<0.2`.

    Args:
        name: which, as for `verifiers.load_environment`; made once for all conversations.
        arguments: further ones of its.
        answer: what is said of a message, with `{content}`.
    """

    def __init__(self, name: str, arguments: dict[str, Any] | None = None, answer: str = "\n{content}\n") -> None:
        self.inner = _loaded(name, json.dumps(arguments or {}, sort_keys=True))
        self.answer = answer

    def reset(self, row: dict[str, Any]) -> list[Message]:
        """Begin its rollout, up to the first question to the policy."""
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.reply: asyncio.Future[str] | None = None
        self.over = False
        self.score: float | None = None
        given = {"answer": "", "info": {}, "example_id": 0} | row
        self.known = 1 if isinstance(row["prompt"], str) else len(row["prompt"])
        in_background(self._scored(given)).add_done_callback(self.events.put)
        return self._heard()

    async def _scored(self, given: dict[str, Any]) -> float | None:
        """The reward of a whole rollout."""
        state = await self.inner.rollout(given, _client(self._asked), "policy", {})
        if state.get("error") is not None:
            raise state["error"]
        await self.inner.rubric.score_rollout(state)
        return None if state["reward"] is None else float(state["reward"])

    async def _asked(self, messages: list[Any]) -> str:
        """The policy's turn, once it is there."""
        self.reply = asyncio.get_running_loop().create_future()
        self.events.put(messages)
        return await self.reply

    def step(self, text: str) -> tuple[list[Message], float | None, bool]:
        """Hand over the turn, and wait for the next question or the end."""
        self._answer(lambda reply: reply.set_result(text))
        self.known += 1
        messages = self._heard()
        return messages, self.score, self.over

    def close(self) -> float | None:
        """Where the rollout waits for a further turn, say that there is none; the reward is what it has come to."""
        if self.over:
            return None
        error = import_module("verifiers.errors").OverlongPromptError("no room for another turn")
        self._answer(lambda reply: reply.set_exception(error))
        self._heard()
        return self.score

    def _answer(self, give: Callable[["asyncio.Future[str]"], None]) -> None:
        assert self.reply is not None
        self.reply.get_loop().call_soon_threadsafe(give, self.reply)

    def _heard(self) -> list[Message]:
        """What is new in the next question to the policy; nothing at the end."""
        event = self.events.get()
        if isinstance(event, Future):
            self.over = True
            self.score = event.result()  # raises what went wrong
            return []
        new, self.known = event[self.known :], len(event)
        texts = [(str(one["role"]), str(one["content"] or "")) for one in new]
        return [{"role": role, "content": self.answer.format(content=content)} for role, content in texts]


@cache
def _loaded(name: str, arguments: str) -> Any:
    """An environment, made once."""
    try:
        library = import_module("verifiers")
        load = library.load_environment
    except (ImportError, AttributeError) as error:
        raise InputError(
            "VerifiersEnvironment needs verifiers 0.1, from 0.1.14 on: "
            "pip install 'grade-lightning[verifiers-environments]'"
        ) from error
    try:
        inner = load(name, **json.loads(arguments))
    except Exception as error:  # a package of its own, which may raise anything
        reason = " ".join(str(error).split())
        raise InputError(f"VerifiersEnvironment.name: {name}: {reason}; install it, or name another") from error
    if inner.rubric.has_group_rewards:
        raise InputError(
            f"VerifiersEnvironment.name: {name}: its rubric compares the completions of a group, and here each has a "
            "score of its own; take another"
        )
    return inner


def _client(ask: Callable[[list[Any]], Any]) -> Any:
    """A client of `verifiers` that asks the policy."""
    base, types = import_module("verifiers.clients").Client, import_module("verifiers.types")

    class PolicyClient(base):  # type: ignore[valid-type]
        """Hands on messages, and makes a response of a text."""

        def setup_client(self, config: Any) -> None:
            return None

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: list[Any]) -> tuple[list[Any], dict[str, Any]]:
            return messages, {}

        async def get_native_response(self, prompt: list[Any], *_: Any, **__: Any) -> str:
            text: str = await ask(prompt)
            return text

        async def raise_from_native_response(self, response: str) -> None:
            return None

        async def from_native_response(self, response: str) -> Any:
            message = types.ResponseMessage(content=response, finish_reason="stop", is_truncated=False)
            return types.Response(id="policy", created=0, model="policy", message=message)

        async def close(self) -> None:
            return None

    return PolicyClient(None)
