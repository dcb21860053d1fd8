"""Prompts with a place for tokens that are not of the data."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.records import Prompts, Rollout

AFTER = "tokens_after_slot"
"""The column that says how many tokens of a prompt come after the place."""


def fill(prompts: Prompts, tokens: list[int], tokenizer: PreTrainedTokenizerBase, slot: str | None) -> Prompts:
    """Put tokens into each prompt.

    Args:
        prompts: those of the data.
        tokens: what is put in.
        tokenizer: the policy's.
        slot: a text that stands in every prompt, and is replaced; None: they come first, behind the BOS token.

    Raises:
        InputError: the text is not in a prompt.
    """
    rows, after = [], []
    for ids, mask in zip(prompts.ids.tolist(), prompts.mask.tolist(), strict=True):
        own = [token for token, there in zip(ids, mask, strict=True) if there]
        if slot is None:
            first = int(own[:1] == [tokenizer.bos_token_id])
            begin, end = own[:first], own[first:]
        else:
            text = str(tokenizer.decode(own, clean_up_tokenization_spaces=False))
            before, found, rest = text.partition(slot)
            if not found:
                raise InputError(f"slot {slot!r}: not in the prompt {text[:80]!r}; every prompt of the data needs it")
            begin, end = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, rest))
        rows.append([*begin, *tokens, *end])
        after.append(len(end))
    width, pad = max(map(len, rows)), int(tokenizer.pad_token_id or 0)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows]).to(prompts.ids)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).to(prompts.mask)
    return Prompts(ids, mask, prompts.columns | {AFTER: after})


def columns_of(rollout: Rollout, count: int) -> Tensor:
    """Where the `count` tokens that were put in lie in `prompt_ids`, (B, count)."""
    after = torch.tensor(rollout.columns[AFTER], device=rollout.prompt_ids.device).unsqueeze(1)
    places = torch.arange(count, device=after.device)
    return rollout.prompt_ids.shape[1] - after - count + places


def exchanged(rollout: Rollout, tokens: list[int]) -> Prompts:
    """The prompts of a rollout with other tokens in their place."""
    given = torch.tensor(tokens, device=rollout.prompt_ids.device).expand(len(rollout.prompt_ids), -1)
    ids = rollout.prompt_ids.scatter(1, columns_of(rollout, len(tokens)), given)
    return Prompts(ids, rollout.prompt_mask, rollout.columns)


def without(rollout: Rollout, count: int) -> Rollout:
    """A rollout as if nothing had been put into its prompts."""
    keep = torch.ones_like(rollout.prompt_ids, dtype=torch.bool).scatter(1, columns_of(rollout, count), False)
    ids, mask = (part[keep].view(len(keep), -1) for part in (rollout.prompt_ids, rollout.prompt_mask))
    columns = {name: values for name, values in rollout.columns.items() if name != AFTER}
    return replace(rollout, prompt_ids=ids, prompt_mask=mask, columns=columns)
