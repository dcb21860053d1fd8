"""Conversations as the policy's chat template writes them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError

Messages = list[dict[str, Any]]
"""Each with "role" and "content"."""
Prompt = str | Messages
"""A prompt: a text, or a conversation."""


@dataclass(frozen=True)
class Chat:
    """A conversation, and what else its template gets."""

    messages: Messages
    tools: list[dict[str, Any] | Callable[..., Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Others, by the names that the template has for them."""


def chat_of(prompt: Prompt, row: Mapping[str, Any], variables: Mapping[str, Any]) -> str | Chat:
    """A text as it is; messages with the tools of their row.

    Args:
        prompt: a text or messages.
        row: whose columns `tools` (a list, or JSON of one) and `chat_template_kwargs` are for the template.
        variables: those of all rows.

    Raises:
        InputError: the tools are no list.

    Example:
        >>> chat_of([{"role": "user", "content": "Hi"}], {"tools": "[]"}, {"enable_thinking": False}).variables
        {'enable_thinking': False}
    """
    if isinstance(prompt, str):
        return prompt
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"column 'tools': {tools!r:.60} is not JSON ({error}); write a list of schemas") from error
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"column 'tools': {tools!r:.60} is not a list; write a list of JSON schemas")
    own = plain(row.get("chat_template_kwargs")) or {}
    return Chat(plain(prompt), plain(tools) or None, {**variables, **own})


def plain(value: Any) -> Any:
    """Without the keys that are None, which Arrow adds so that all messages of a column have the same.

    Example:
        >>> plain([{"role": "user", "content": "Hi", "tool_calls": None}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if part is not None or name == "content"}
    return [plain(part) for part in value] if isinstance(value, list) else value


def as_text(tokenizer: PreTrainedTokenizerBase, prompt: "Prompt | Chat") -> str:
    """A text as it is, or what the chat template makes of a conversation that is to be continued.

    Raises:
        InputError: there is no template, or it does not take the conversation.
    """
    if isinstance(prompt, str):
        return prompt
    chat = prompt if isinstance(prompt, Chat) else Chat(prompt)
    messages = chat.messages
    goes_on = messages[-1]["role"] == "assistant"
    if goes_on and not str(messages[-1]["content"] or "").strip():
        messages, goes_on = messages[:-1], False  # the turn has begun, and nothing is said yet
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    return str(written(tokenizer, chat, messages, **options))


def written(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, messages: Messages, column: str = "prompt", **options: Any
) -> Any:
    """What the chat template makes of some messages of a conversation.

    Args:
        tokenizer: with the template.
        chat: the conversation.
        messages: of it.
        column: what to call it in an error.
        **options: of `apply_chat_template`; text is made unless they say otherwise.

    Raises:
        InputError: there is no template, or it does not take them.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"column '{column}' holds messages, but the tokenizer has no chat template; "
            "write the prompts as text, or use a chat model"
        )
    settings = {"tokenize": False, **chat.variables, **options}
    try:
        return tokenizer.apply_chat_template(messages, tools=chat.tools, **settings)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:  # a template is a program
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"column '{column}': the chat template does not take {messages!r:.100} ({reason}); change it or drop it"
        ) from error
