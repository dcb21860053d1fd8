"""Rows of tokens as a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError


def pad(ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and mask; the mask comes from the lengths, since the padding token may also be the EOS."""
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if filler is None:
        raise InputError("the tokenizer has neither a pad_token nor an eos_token to pad with; set its pad_token")
    tokens = torch.full((len(ids), max(map(len, ids))), filler, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        here = slice(-len(row), None) if left else slice(len(row))
        tokens[i, here] = torch.tensor(row)
        mask[i, here] = 1
    return tokens, mask
