"""Conversations to learn from: their tokens, and which of them the assistant said."""

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from grade_lightning.data.texts import Messages
from grade_lightning.errors import InputError
from grade_lightning.policies.chat import Chat, written
from grade_lightning.policies.encoding import with_end
from grade_lightning.policies.endings import end_of_turn

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "Xq7Zk4Vw"
"""Words that stand in for what the assistant says."""

Span = tuple[int, int]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, ends: Iterable[int] = (), first: int = 0, column: str = "messages"
) -> tuple[list[int], list[int]]:
    """Tokens of a whole conversation with an end, and a mask of what the assistant says, its ends of turn included.

    A template that has `{% generation %}` says itself which tokens these are. For others the conversation is rendered
    up to each turn, and what stands between the beginning of the turn and its end is the assistant's.

    Args:
        tokenizer: with a chat template.
        chat: the conversation; its last message is the assistant's.
        ends: end tokens beside the tokenizer's own.
        first: the number of the first message to learn from.
        column: what to call the conversation in an error.

    Returns:
        Token ids, and 1 for each token to learn, 0 for the others.

    Raises:
        InputError: the template does not take the conversation, or leaves unclear what the assistant says.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({"[u]": 0, "[a]": 1, "Hi": 2, "</s>": 3}, unk_token="Hi"))
        >>> inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        ...     "{% if add_generation_prompt %}[a]{% endif %}"
        ... )
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
        >>> encode_conversation(tokenizer, Chat(messages))
        ([0, 2, 3, 1, 2, 3], [0, 0, 0, 0, 1, 1])
    """
    if not first and _marks(tokenizer, chat):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = written(tokenizer, chat, chat.messages, column, **options)
        ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    else:
        text = written(tokenizer, chat, chat.messages, column)
        spans = assistant_spans(tokenizer, chat, text, first, column)
        if not tokenizer.is_fast:
            raise InputError(
                f"column '{column}': tokens of the assistant are found by the places of tokens, which the tokenizer "
                f"({type(tokenizer).__name__}) does not give; use a fast one, or write 'prompt' and 'completion'"
            )
        parts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(parts["input_ids"])
        mask = [int(any(_within(text, place, span) for span in spans)) for place in parts["offset_mapping"]]
    if not any(mask):
        raise InputError(
            f"column '{column}': the chat template marks nothing that the assistant says in {chat.messages!r:.100}; "
            "mend its {% generation %}, or drop the row"
        )
    whole = with_end(tokenizer, ids, end_of_turn(tokenizer), ends)
    said = int(chat.messages[-1]["role"] == "assistant")
    return whole, [*mask, *[said] * (len(whole) - len(ids))][: len(whole)]


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, first: int = 0, column: str = "messages"
) -> list[Span]:
    """Where the assistant speaks in a rendered conversation: from the generation prompt to the end of the turn.

    Args:
        tokenizer: with the template.
        chat: the conversation.
        text: what the template made of it.
        first: the number of the first message to look at.
        column: what to call the conversation in an error.

    Raises:
        InputError: it cannot be told.
    """
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant" and i >= first:
            start = _start(tokenizer, chat, text, i)
            end = None if start is None else _end(tokenizer, chat, text, i, start)
            if start is None or end is None:
                raise InputError(
                    f"column '{column}': the chat template writes a turn differently when others follow it, so that "
                    "it is unclear what the assistant says; put {% generation %} and {% endgeneration %} around it"
                )
            spans.append((start, end))
    return spans


def _within(text: str, place: Span, span: Span) -> bool:
    """Whether a token is of a span; a space in front of its first word may belong to the token."""
    (begin, end), (start, stop) = place, span
    return start <= begin < stop or (begin < start < end and not text[begin:start].strip())


def _start(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, i: int) -> int | None:
    begun = _try(tokenizer, chat, chat.messages[:i], add_generation_prompt=True)
    if begun and text.startswith(begun):
        return len(begun)
    before, found, _ = _marked(tokenizer, chat, i).rpartition(_MARK)
    return _shared(before, text) if found else None


def _end(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, i: int, start: int) -> int | None:
    number = end_of_turn(tokenizer)
    turn = "" if number is None else str(tokenizer.convert_ids_to_tokens(number))
    upto = _try(tokenizer, chat, chat.messages[: i + 1])
    if upto and text.startswith(upto) and len(upto) > start:
        said = text[start : len(upto)]
        return start + len(said.rstrip()) if turn and said.rstrip().endswith(turn) else len(upto)
    if turn and turn in text[start:]:
        return text.index(turn, start) + len(turn)
    _, found, after = _marked(tokenizer, chat, i).rpartition(_MARK)
    end = len(text) - len(after)
    return end if found and text.endswith(after) and end > start else None


def _marked(tokenizer: PreTrainedTokenizerBase, chat: Chat, i: int) -> str:
    """The conversation with other words in one of its messages."""
    messages = [*chat.messages[:i], {**chat.messages[i], "content": _MARK}, *chat.messages[i + 1 :]]
    return _try(tokenizer, chat, messages) or ""


def _try(tokenizer: PreTrainedTokenizerBase, chat: Chat, messages: Messages, **options: Any) -> str | None:
    """What the template makes of a part of the conversation; None where it refuses it."""
    try:
        return str(written(tokenizer, chat, messages, **options)) if messages else None
    except InputError:
        return None


def _shared(one: str, two: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _marks(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> bool:
    template = chat.variables.get("chat_template") or tokenizer.chat_template
    found = template.get("default", "") if isinstance(template, dict) else template
    return bool(_GENERATION.search(found or ""))
