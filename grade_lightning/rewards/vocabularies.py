"""What each token of a vocabulary is in another tokenizer's pieces."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.numerics import widened

_WORD = "Hello"


def pieces_of_vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, foreign: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Pieces of what each token says behind a word; none of special tokens and of bytes that are no character.

    Behind a word, so that a space in front of a token counts and that one without is the continuation of a word, as it
    is in most texts.

    Args:
        tokenizer: whose tokens.
        size: their number; there may be more than the tokenizer knows.
        foreign: whose pieces.
    """
    word: list[int] = tokenizer.encode(_WORD, add_special_tokens=False)
    known = min(size, len(tokenizer))
    front = str(tokenizer.decode(word, skip_special_tokens=True))
    alone, behind = (
        tokenizer.batch_decode([[*begin, i] for i in range(known)], skip_special_tokens=True) for begin in ([], word)
    )
    said = [w.removeprefix(front) if w.startswith(front) else a for a, w in zip(alone, behind, strict=True)]
    there = _encode(foreign, [front])[0]
    found = []
    for text, own, whole in zip(
        said, _encode(foreign, said), _encode(foreign, [front + text for text in said]), strict=True
    ):
        stable = whole[: len(there)] == there
        found.append([] if "\ufffd" in text or not text else whole[len(there) :] if stable else own)
    return found + [[] for _ in range(size - known)]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def translated_table(pieces: Sequence[Sequence[int]], table: Tensor) -> Tensor:
    """Embedding of each token as the mean of its pieces'; of a token without pieces the mean of all others.

    Args:
        pieces: of each of V tokens, V lists.
        table: of the pieces, (pieces there are, width).

    Returns:
        (V, width)

    Example:
        >>> translated_table([[0], [0, 1], []], torch.tensor([[2.0], [4.0]]))
        tensor([[2.0000],
                [3.0000],
                [2.5000]])
    """
    flat = torch.tensor([piece for row in pieces for piece in row], dtype=torch.long, device=table.device)
    counts = torch.tensor([len(row) for row in pieces], device=table.device)
    begins = counts.cumsum(0) - counts
    means = torch.nn.functional.embedding_bag(flat, widened(table), begins, mode="mean")
    silent = counts == 0
    return torch.where(silent.unsqueeze(1), means[~silent].mean(0), means).to(table.dtype)
