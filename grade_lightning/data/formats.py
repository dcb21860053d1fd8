"""TRL's formats as one: a `prompt`, and completions of it that are text wherever they can be."""

from collections.abc import Sequence
from typing import Any

from grade_lightning.data.pairs import split_pair
from grade_lightning.errors import InputError
from grade_lightning.policies.chat import Messages, Prompt, plain

Table = dict[str, list[Any]]

COMPLETIONS = "completion", "chosen", "rejected"


def with_prompts(table: Table, name: str) -> Table:
    """Give every row a `prompt`, where its columns say it, and write a completion of one message as its text.

    The prompt of `messages` is all of them but the assistant's last words. That of `chosen` and `rejected` is what both
    begin with. Completions that are messages belong to a conversation: a prompt that is text is its user's first
    message, and one that they repeat is left out of them. Those of several messages stay messages.

    Args:
        table: columns of the rows.
        name: what to call the table in an error.

    Raises:
        InputError: messages that are none, or a pair whose completions do not follow the same prompt.

    Example:
        >>> asked, said = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
        >>> with_prompts({"prompt": [[asked]], "completion": [[said]]}, "mine")["completion"]
        ['4']
        >>> with_prompts({"messages": [[asked, said]]}, "mine")["prompt"]
        [[{'role': 'user', 'content': '2+2?'}]]
    """
    table = {column: list(values) for column, values in table.items()}
    if "messages" in table:
        for i, messages in enumerate(table["messages"]):
            check_messages(messages, "messages", f"{name}: row {i}")
        if "prompt" not in table:
            table["prompt"] = [_asked(messages) for messages in table["messages"]]
    if {"chosen", "rejected"} <= table.keys() and not {"text", "prompt"} & table.keys():
        pairs = zip(table.pop("chosen"), table.pop("rejected"), strict=True)
        parts = [split_pair(plain(one), plain(two), f"{name}: row {i}") for i, (one, two) in enumerate(pairs)]
        return table | {
            column: [part[k] for part in parts] for k, column in enumerate(("prompt", "chosen", "rejected"))
        }
    found = [column for column in COMPLETIONS if column in table and "prompt" in table]
    for i in range(len(table["prompt"]) if found else 0):
        said = {column: table[column][i] for column in found}
        if any(isinstance(value, list) for value in said.values()):
            prompt, said = _answered(table["prompt"][i], said, f"{name}: row {i}")
            for column, value in {"prompt": prompt, **said}.items():
                table[column][i] = value
    return table


def as_chat(table: Table, system_prompt: str | None) -> Table:
    """Prompts as conversations: a text is what the user says.

    Args:
        table: columns of the rows.
        system_prompt: what begins a conversation that has no system message.

    Example:
        >>> as_chat({"prompt": ["2+2?"]}, "Count.")["prompt"][0][0]
        {'role': 'system', 'content': 'Count.'}
    """

    def begun(prompt: Prompt) -> Messages:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else plain(prompt)
        if system_prompt is None or messages[0]["role"] in ("system", "developer"):
            return list(messages)
        return [{"role": "system", "content": system_prompt}, *messages]

    return {
        name: [begun(value) for value in values] if name in ("prompt", "messages") else values
        for name, values in table.items()
    }


def check_messages(value: object, column: str, name: str) -> None:
    """Check that something is messages.

    Raises:
        InputError: it is not.
    """
    messages = value if isinstance(value, list) else []
    if not messages or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        wanted = "a text or a list of role and content" if column == "prompt" else "a list of role and content"
        raise InputError(f"{name}: '{column}' is {value!r:.100}; write {wanted}")


def _asked(messages: Messages) -> Messages:
    return messages[:-1] if messages[-1]["role"] == "assistant" and len(messages) > 1 else messages


def _answered(prompt: Any, values: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """A prompt and its completions, of which some are messages."""
    found: dict[str, Any] = {}
    prompts: list[Any] = []
    for column, value in values.items():
        begun = plain(prompt)
        if isinstance(value, list):
            check_messages(value, column, name)
            begun, value = _follow(begun, plain(value))
            if not value or value[0]["role"] != "assistant":
                raise InputError(
                    f"{name}: '{column}' has no message of the assistant after the prompt; let it begin with one, or "
                    "repeat the whole prompt before it"
                )
            value = _words(value)
        found[column] = value
        prompts.append(begun)
    if any(other != prompts[0] for other in prompts):
        raise InputError(f"{name}: {' and '.join(map(repr, values))} do not follow the same prompt; write them alike")
    return prompts[0], found


def _follow(prompt: Prompt, messages: Messages) -> tuple[Messages, Messages]:
    """The conversation that a completion follows, and the messages that are new in it."""
    if isinstance(prompt, str):
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
        repeats = first > 0 and messages[first - 1]["content"] == prompt
        return (messages[:first], messages[first:]) if repeats else ([{"role": "user", "content": prompt}], messages)
    return prompt, messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


def _words(messages: Sequence[dict[str, Any]]) -> Any:
    """What a single message says, if it is text and nothing else; else the messages."""
    (first, *more) = messages
    simple = not more and first.keys() == {"role", "content"} and isinstance(first["content"], str)
    return first["content"] if simple else list(messages)
