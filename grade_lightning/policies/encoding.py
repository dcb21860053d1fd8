"""Encoding: texts, conversations and completions as tokens, with the special tokens that belong to them, each once."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.policies.chat import Chat, Messages, as_text
from grade_lightning.policies.endings import added_tokens, end_ids, end_of_turn, render

Prompt = str | Messages | Chat

_PROBE = "Hello"
_ANCHORS = ("\n", ".", "a")
"""Texts after which a completion is tokenised, where it cannot be after its own prompt."""


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokenise all of a text or conversation, as in :func:`encode_all`."""
    (ids,) = encode_all(tokenizer, [prompt])
    return ids


def encode_all(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokenise texts and conversations, without an end.

    A conversation has the tokens that its chat template writes; one that ends with the assistant's words is continued.
    A text begins with what the tokenizer itself puts in front of it. A tokenizer whose BOS also is its EOS, as GPT-2's,
    puts nothing; it has that token between texts, so they begin with it. A text that begins as the chat template does
    has been rendered, and stays as it is.

    Raises:
        InputError: there is no chat template for a conversation, or there are no tokens.
    """
    texts = [as_text(tokenizer, prompt) for prompt in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    if any(isinstance(prompt, str) for prompt in prompts) and (front := _front(tokenizer)):
        begins, opened = _beginnings(tokenizer), _openings(tokenizer)
        for number, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):
            if isinstance(prompt, str) and not (row[:1] and row[0] in begins) and not prompt.startswith(opened):
                ids[number] = front + row
    for prompt, row in zip(prompts, ids, strict=True):
        if not row:
            raise InputError(f"the tokenizer makes no token of {prompt!r}; drop the row or use another tokenizer")
    return ids


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    completions: Sequence[str],
    ends: Iterable[int] = (),
) -> list[list[int]]:
    """Tokenise what follows prompts, with an end: the prompt's tokens and these are those of both texts together.

    Where a token would reach over the end of the prompt, or the end would be lost, the completion is tokenised by
    itself, since sampled completions follow the prompt's own tokens.

    Args:
        tokenizer: of both.
        prompts: B prompts.
        ids: their tokens.
        completions: what follows each.
        ends: end tokens beside the tokenizer's own.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
        >>> encode_completions(tokenizer, ["ab"], [[0, 1]], ["ba"])
        [[1, 0, 2]]
    """
    texts = [as_text(tokenizer, prompt) for prompt in prompts]
    both = [text + completion for text, completion in zip(texts, completions, strict=True)]
    whole: list[list[int]] = tokenizer(both, add_special_tokens=False, verbose=False)["input_ids"] if both else []
    turn, front, found = end_of_turn(tokenizer), _front(tokenizer), []
    for prompt, own, row, completion in zip(prompts, ids, whole, completions, strict=True):
        joined = next((x for x in (row, front + row) if x[: len(own)] == own), None)
        tokens = _alone(tokenizer, own, row, completion) if joined is None else joined[len(own) :]
        talk = not isinstance(prompt, str) or turn in own
        found.append(with_end(tokenizer, tokens, turn if talk else None, ends))
    return found


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ends: Iterable[int] = ()) -> list[list[int]]:
    """Tokenise whole texts, each with one end: EOS, or the end of a turn after a conversation that was rendered."""
    turn, front, found = end_of_turn(tokenizer), _front(tokenizer), []
    for ids in encode_all(tokenizer, texts):
        begin = len(front) if ids[: len(front)] == front else 0
        found.append(ids[:begin] + with_end(tokenizer, ids[begin:], turn if turn in ids else None, ends))
    return found


def with_end(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], end: int | None = None, ends: Iterable[int] = ()
) -> list[int]:
    """Tokens with one end: their own, where they have it, without what follows; else the one that is given.

    Args:
        tokenizer: of the tokens.
        ids: tokens.
        end: what is appended; None for the tokenizer's EOS.
        ends: end tokens beside the tokenizer's own.
    """
    known, last = {*end_ids(tokenizer), *ends}, len(ids)
    while last and (ids[last - 1] in known or not str(tokenizer.decode([ids[last - 1]])).strip()):
        last -= 1
    for place in range(last, len(ids)):
        if ids[place] in known:
            return ids[: place + 1]  # a template writes a new line after it, which nobody would sample
    end = tokenizer.eos_token_id if end is None else end
    return ids if end is None else [*ids, end]


def _alone(tokenizer: PreTrainedTokenizerBase, prompt: list[int], both: list[int], completion: str) -> list[int]:
    """Tokens of a completion that can follow the prompt's own: the first ones that give the text of both."""

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    alone, wanted = tokens(completion), decoded(both)
    candidates = [alone]
    for anchor in _ANCHORS:  # tokenizers in SentencePiece's fashion put a space in front of a text
        before, after = tokens(anchor), tokens(anchor + completion)
        candidates += [after[len(before) :]] if after[: len(before)] == before else []
    return next((ids for ids in candidates if decoded(prompt + ids).endswith(wanted)), alone)


def _front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands in front of a text."""
    plain = tokenizer.encode(_PROBE, add_special_tokens=False)
    whole: list[int] = tokenizer(_PROBE)["input_ids"]
    places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    front = whole[: places[0]] if plain and places else [i for i in whole[:1] if i == bos]
    return front or ([bos] if bos is not None and bos == eos else [])


def _beginnings(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens after which nothing more is put in front: BOS, and the special token with which a conversation begins."""
    known = added_tokens(tokenizer)
    text = render(tokenizer, [{"role": "user", "content": _PROBE}]) or ""
    first = [content for content in known if text.startswith(content)]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return {*_front(tokenizer)[:1], *bos, *([known[max(first, key=len)]] if first else [])}


def _openings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts with which conversations begin."""
    system: dict[str, Any] = {"role": "system", "content": _PROBE}
    user: dict[str, Any] = {"role": "user", "content": "Bye"}
    texts = [(render(tokenizer, [system, user]) or "", _PROBE), (render(tokenizer, [user]) or "", "Bye")]
    found = [text.partition(word)[0] for text, word in texts if word in text]
    return tuple(text for text in found if text.strip())
