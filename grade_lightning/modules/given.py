"""Completions of the data in the form of a rollout."""

from typing import Any

import torch
from torch.nn.functional import pad

from grade_lightning.policies import Policy
from grade_lightning.records import Rollout


def given_rollout(batch: dict[str, Any], policy: Policy, *names: str) -> Rollout:
    """Completions of the data as a rollout: those of the first name, then those of the next.

    Nobody sampled them, so there are no `engine_logps`.

    Args:
        batch: with prompts, and `{name}_ids` and `{name}_mask` of each name.
        policy: whose tokenizer pads them.
        *names: of the completions.
    """
    longest = max(batch[f"{name}_ids"].shape[1] for name in names)
    ids, masks = (
        torch.cat([pad(x, (0, longest - x.shape[1]), value=value) for x in (batch[f"{name}_{part}"] for name in names)])
        for part, value in (("ids", policy.tokenizer.pad_token_id), ("mask", 0))
    )
    prompts = torch.arange(len(batch["input_ids"]))
    return Rollout(
        prompt_ids=batch["input_ids"].repeat(len(names), 1),
        prompt_mask=batch["attention_mask"].repeat(len(names), 1),
        completion_ids=ids,
        completion_mask=masks.bool(),
        engine_logps=None,
        tokenizer=policy.tokenizer,
        columns={name: values * len(names) for name, values in batch["columns"].items()},
        eos_ids=policy.eos_ids,
        groups=prompts.repeat(len(names)),
    )
