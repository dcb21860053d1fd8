"""Windows: completions that are trained on in several steps, and which step trains on which of them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.functional.micro_batches import even_by_tokens
from grade_lightning.records import Batching, Experience

Plan = list[tuple[Tensor, Normalizers]]
"""For each step the rows that it trains on, and what its means are taken over."""


@dataclass
class Window:
    """What was drawn at once, and the steps that train on it."""

    experience: Experience
    plan: Plan = field(default_factory=list)

    def part(self, step: int) -> Experience:
        """What a step trains on."""
        rows, normalizers = self.plan[step]
        part = self.experience.select(rows)
        part.normalizers = normalizers
        return part

    def pack(self) -> dict[str, Any]:
        """Tensors and plain values alone, as a checkpoint may hold them."""
        return {"experience": self.experience.pack(), "plan": [(rows, *totals) for rows, totals in self.plan]}

    @classmethod
    def unpack(cls, packed: dict[str, Any], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> "Window":
        """The inverse of :meth:`pack`."""
        experience = Experience.unpack(move_data_to_device(packed["experience"], device), tokenizer)
        return cls(experience, [(rows, Normalizers(*totals)) for rows, *totals in packed["plan"]])


def plan_steps(
    seen: Experience,
    batching: Batching,
    mean: Callable[[Tensor], Tensor],
    whole_groups: bool = False,
    neighbours: bool = False,
    by_tokens: bool = False,
) -> Plan:
    """Share out the completions over the steps of a window.

    The rows are shuffled in each epoch, if it has several optimizer steps. Micro-batches of an optimizer step hold
    completions of similar length, so that little of them is padding. Which micro-batch of a step has which rows changes
    nothing in the step's gradient, but with gates that look at all tokens at once (GPPO's centred ratios).

    Args:
        seen: the completions.
        batching: how many epochs, optimizer steps and micro-batches.
        mean: mean of a tensor over the processes.
        whole_groups: keep the completions of a prompt together; else they may go to different steps.
        neighbours: those of a prompt that are in the same step go to the same micro-batch, as far as it is large
            enough; prompts are sorted by their longest completion.
        by_tokens: micro-batches of an optimizer step have about as many tokens, padding included, instead of as many
            completions.

    Raises:
        InputError: they cannot be shared out evenly.
    """
    lengths = seen.sampled.sum(-1).cpu()
    members = list(torch.arange(len(lengths)).unsqueeze(1))
    if whole_groups:
        members = [(seen.rollout.layout.row == group).nonzero().squeeze(1) for group in range(_count(seen))]
    units, parts, accumulation = len(members), batching.parts, batching.accumulation or 1
    if units % parts:
        name = "prompts" if whole_groups else "completions"
        raise InputError(f"{units} {name} cannot be divided evenly into {parts} parts; change data.batch_size")
    several = batching.minibatches > 1
    orders = [torch.randperm(units) if several else torch.arange(units) for _ in range(batching.epochs)]
    steps = [step for order in orders for step in order.chunk(batching.minibatches)]
    if accumulation > 1:
        longest = torch.stack([lengths[rows].max() for rows in members])
        prompts = torch.stack([seen.rollout.layout.row[rows[0]] for rows in members])
        steps = [_sorted(step, longest[step], prompts[step] if neighbours else None) for step in steps]
    cuts = [_by_tokens(step, members, seen, accumulation) if by_tokens else step.chunk(accumulation) for step in steps]
    chunks = [torch.cat([members[unit] for unit in chunk]) for chunk in itertools.chain.from_iterable(cuts)]
    counts = torch.stack([torch.stack([lengths[rows].sum(), torch.tensor(len(rows))]) for rows in chunks])
    own = counts.float().to(seen.rollout.ids.device).unflatten(0, (-1, accumulation)).mean(1)
    totals = mean(own).repeat_interleave(accumulation, 0).tolist()
    return [(rows, Normalizers(tokens, count)) for rows, (tokens, count) in zip(chunks, totals, strict=True)]


def _by_tokens(step: Tensor, members: list[Tensor], seen: Experience, parts: int) -> tuple[Tensor, ...]:
    """The units of a step in micro-batches of about the same number of tokens, prompts included."""
    prompts, completions = seen.rollout.host_lengths
    lengths = prompts + completions
    rows = [members[unit] for unit in step]
    counts = even_by_tokens([len(own) for own in rows], [int(lengths[own].max()) for own in rows], parts)
    pieces: tuple[Tensor, ...] = step.split(counts)
    return pieces


def _sorted(units: Tensor, longest: Tensor, prompts: Tensor | None) -> Tensor:
    """By length; with prompts, by that of the prompt's longest, and those of a prompt one after another."""
    if prompts is None:
        return units[longest.argsort(stable=True)]
    most = longest.new_zeros(int(prompts.max()) + 1).scatter_reduce(0, prompts, longest, "amax")[prompts]
    order = prompts.argsort(stable=True)
    return units[order[most[order].argsort(stable=True)]]


def _count(seen: Experience) -> int:
    return seen.rollout.layout.shape[0]
