"""What ends a completion: one set of end tokens for texts, sampler, reward and export."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

Template = str | dict[str, str] | None

_ASKED, _SAID = "Hello there", "Fine thanks"
_TURNS: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Template, int | None]]" = WeakKeyDictionary()


def end_ids(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None = None) -> list[int]:
    """Tokens that end a completion: those of the generation settings, the tokenizer's EOS, and the end of a turn.

    Args:
        tokenizer: with its chat template, if it has one.
        settings: the model's.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
        >>> end_ids(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"), GenerationConfig(eos_token_id=0))
        [0, 1]
    """
    own: Any = settings.eos_token_id if settings is not None else None
    found = own if isinstance(own, Iterable) else [own]
    return list(
        dict.fromkeys(int(i) for i in (*found, tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None)
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special or added token that the chat template writes after an assistant's words; None if there is none.

    It is found by rendering. Space between the words and the token is allowed; other text is not.
    """
    template: Template = tokenizer.chat_template
    if tokenizer not in _TURNS or _TURNS[tokenizer][0] != template:
        _TURNS[tokenizer] = template, _after_assistant(tokenizer)
    return _TURNS[tokenizer][1]


def _after_assistant(tokenizer: PreTrainedTokenizerBase) -> int | None:
    messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
    text = render(tokenizer, messages)
    if text is None or _SAID not in text:
        return None
    after = text.rpartition(_SAID)[2].lstrip()
    known = {content: i for content, i in added_tokens(tokenizer).items() if after.startswith(content)}
    return known[max(known, key=len)] if known else None


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Texts that are always one token, with their ids: special and added ones, but for white space."""
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    found |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {content: i for content, i in found.items() if content.strip()}


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str | None:
    """A conversation as the chat template writes it; None where there is no template, or it refuses these roles."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError):  # a dictionary of templates may have no default one
        return None
