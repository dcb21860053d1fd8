"""Conversations as a reward reads them: by its own chat template, or what is said in them."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.records import Rollout

Messages = list[dict[str, Any]]

_ANSWER = "Fine thanks"


def conversations(rollout: Rollout) -> list[Messages | None]:
    """Of each row the messages of its prompt; None where the prompt is a text."""
    prompts = rollout.columns.get("prompt", [None] * len(rollout.ids))
    return [prompt if isinstance(prompt, list) else None for prompt in prompts]


def with_answer(messages: Messages, completion: str) -> Messages:
    """A conversation with the assistant's answer.

    Where the last message is the assistant's, the completion continues it.

    Example:
        >>> with_answer([{"role": "user", "content": "2+2?"}], "4")[-1]
        {'role': 'assistant', 'content': '4'}
    """
    begun = ""
    if messages[-1]["role"] == "assistant":
        messages, begun = messages[:-1], str(messages[-1]["content"] or "")
    return [*messages, {"role": "assistant", "content": begun + completion}]


def spoken(messages: Messages) -> str:
    r"""What is said in a conversation, a message a line, without the roles and the system's message.

    For a reward without a chat template: in its words another model's template is noise.

    Example:
        >>> spoken([{"role": "system", "content": "Count."}, {"role": "user", "content": "2+2?"}])
        '2+2?'
    """
    said = (message for message in messages if message["role"] not in ("system", "developer"))
    return "\n".join(str(message["content"] or "") for message in said)


def answered(tokenizer: PreTrainedTokenizerBase, messages: Messages, completion: str) -> str:
    """A conversation :func:`with_answer`, as the chat template writes it.

    Raises:
        InputError: the template does not take it.
    """
    return rendered(tokenizer, with_answer(messages, completion))


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, **kwargs: Any) -> str:
    """Messages as the chat template writes them.

    Args:
        tokenizer: whose template.
        messages: the conversation.
        **kwargs: those of `apply_chat_template`, and of the template itself.

    Raises:
        InputError: the template does not take them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except Exception as error:  # a template is a program: anything may fail
        if not isinstance(error, (TemplateError, ValueError, TypeError, KeyError, AttributeError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"reward {tokenizer.name_or_path}: its chat template does not take {messages!r:.100} ({reason}); fix it, "
            "or remove it from the folder to have what is said scored as plain text"
        ) from error


def around(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, str]:
    r"""What the chat template writes before the words of the answer, and after them.

    Raises:
        InputError: the template does not take the conversation, or leaves out the answer.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        >>> around(tokenizer, [{"role": "user", "content": "Hi."}])
        ('user: Hi.\nassistant: ', '\n')
    """
    text = answered(tokenizer, messages, _ANSWER)
    before, found, after = text.rpartition(_ANSWER)
    if not found:
        raise InputError(
            f"reward {tokenizer.name_or_path}: its chat template leaves out what the assistant says; fix it, or "
            "remove it from the folder to have what is said scored as plain text"
        )
    return before, after
