"""Where in a text the policy's tokens are."""

from collections.abc import Sequence

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.records import Rollout

from .retokenize import Pieces

Span = tuple[int, int]
"""The first character and the one after the last."""


def check_fast(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Check that a tokenizer says which characters a token is made of.

    Args:
        tokenizer: to be checked.
        whose: for the message.

    Raises:
        InputError: it does not.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{whose}: its tokenizer ({type(tokenizer).__name__}) does not say which characters a token is made of; "
            "give a folder with a tokenizer.json"
        )


def rollout_spans(rollout: Rollout, pieces: Pieces) -> Tensor:
    """Where the tokens of prompts and completions are in the texts that a reward reads, (B, P + T, 2), on the CPU.

    The EOS of a completion that ended by itself is one character behind the text. Of a conversation the tokens of the
    prompt are nowhere, and where a chat template wrote it, what ends the completion is not either.

    Raises:
        InputError: a chat template does not repeat what the assistant said.
    """
    spans = torch.zeros(*rollout.ids.shape, 2, dtype=torch.int64)
    prompt = rollout.prompt_ids.shape[1]
    ids, mask, ended = rollout.ids.cpu(), rollout.mask.cpu().bool(), rollout.has_eos.tolist()
    for row, (text, plain) in enumerate(zip(pieces.texts, pieces.plain, strict=True)):
        here = mask[row].clone()
        here[: 0 if plain else prompt] = False
        said = text if plain else rollout.completions[row]
        found = torch.tensor(token_spans(rollout.tokenizer, ids[row, here].tolist(), said))
        if not plain:
            begin = _begin(text, said.strip())
            found = found + begin - (len(said) - len(said.lstrip()))
            found = found.clamp(begin, begin + len(said.strip()))
        if ended[row] and not pieces.templated[row]:
            found[-1] = torch.tensor([len(text), len(text) + 1])
        spans[row, here] = found
    return spans


def _begin(written: str, said: str) -> int:
    """Where a template wrote what was said; templates may strip it."""
    begin = written.rfind(said)
    if begin < 0:
        raise InputError(
            f"reward: its chat template does not write what the assistant says as it is ({said!r:.100}), so that its "
            "gradient has no place; fix the template, or remove it from the folder to have what is said scored as "
            "plain text"
        )
    return begin


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[Span]:
    """Where in their text some tokens are.

    Tokens that are bytes of the same character all have its place; special tokens have places of no length.

    Args:
        tokenizer: a fast one.
        ids: of the tokens.
        text: what the tokenizer makes of them, without special tokens.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({"<eos>": 0, "so": 1, "long": 2}, unk_token="so"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
        >>> token_spans(tokenizer, [1, 2, 0], "so long")
        [(0, 2), (2, 7), (7, 7)]
    """
    inner = tokenizer.backend_tokenizer
    special = {number for number, token in inner.get_added_tokens_decoder().items() if token.special}
    stream = DecodeStream(skip_special_tokens=True)
    spans: list[Span] = []
    streamed, waiting = "", []
    for place, number in enumerate(ids):
        spans.append((len(streamed), len(streamed)))
        if number in special:
            continue
        waiting.append(place)
        if (found := stream.step(inner, number)) is not None:
            for at in waiting:
                spans[at] = len(streamed), len(streamed) + len(found)
            streamed, waiting = streamed + found, []
    for at in waiting:  # bytes of no character: what is made of them is the rest
        spans[at] = len(streamed), max(len(streamed), len(text))
    return spans if text.startswith(streamed) else _moved(spans, streamed, text)


def _moved(spans: list[Span], streamed: str, text: str) -> list[Span]:
    """The same in a text from which some characters were taken away, as spaces before punctuation."""
    places = []
    at = 0
    for character in streamed:
        places.append(at)
        at += text[at : at + 1] == character
    places += [at] * (len(text) + 1)
    return [(places[begin], places[end]) for begin, end in spans]
