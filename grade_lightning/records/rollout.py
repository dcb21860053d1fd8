"""Rollouts: prompts with their completions."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from grade_lightning.functional.groups import Groups, group_by

from .prompts import prompt_keys

_LATER: Any = None  # set in __post_init__


@dataclass
class Rollout:
    """Completions of prompts. B sequences, P prompt tokens (padded on the left), T completion tokens.

    The completion ends with its end-of-sequence token, which belongs to it; what follows is padding.
    """

    prompt_ids: Tensor
    """(B, P)"""
    prompt_mask: Tensor
    """(B, P), 0 for padding."""
    completion_ids: Tensor
    """(B, T)"""
    completion_mask: Tensor
    """(B, T), bool: tokens that are attended to: all up to and including the last."""
    engine_logps: Tensor | None
    """(B, T), float32: log-probabilities by which the engine says it sampled the tokens; None: nobody sampled them."""
    tokenizer: PreTrainedTokenizerBase
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The other columns of the rows, handed to reward functions by name."""
    eos_ids: list[int] = field(default_factory=list)
    sampled: Tensor = _LATER
    """(B, T), bool: tokens that the policy chose, and is trained on. A tool's answer is attended to and not sampled.
    By default all of `completion_mask`."""
    groups: Tensor = _LATER
    """(B,): a label for each completion, the same for those of one prompt. By default each is by itself."""
    turns: Tensor | None = None
    """(B, T): which turn each token belongs to, from 0; None: there are no turns."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, too; the token that completes one is its last."""

    _PROMPT: ClassVar[tuple[str, ...]] = ("prompt_ids", "prompt_mask")
    _TOKENS: ClassVar[tuple[str, ...]] = ("completion_ids", "completion_mask", "engine_logps", "sampled", "turns")

    def __post_init__(self) -> None:
        """Wait for the device here, where a sampler waits anyway, and not in the training pass."""
        if self.sampled is None:
            self.sampled = self.completion_mask
        if self.groups is None:
            self.groups = torch.arange(len(self.completion_ids))
        self.groups = self.groups.cpu()
        _ = self.positions, self.layout, self.host_lengths

    @property
    def ids(self) -> Tensor:
        """Prompt and completion, (B, P + T)."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def mask(self) -> Tensor:
        """Attention mask of :attr:`ids`, (B, P + T)."""
        return torch.cat([self.prompt_mask, self.completion_mask.to(self.prompt_mask.dtype)], dim=1)

    @property
    def lengths(self) -> Tensor:
        """Number of completion tokens, sampled or not, (B,)."""
        return self.completion_mask.sum(-1)

    @cached_property
    def host_lengths(self) -> tuple[Tensor, Tensor]:
        """Number of tokens of each prompt and of each completion, (B,) both, in the memory of the processor."""
        prompts, completions = torch.stack([self.prompt_mask.sum(-1), self.lengths]).cpu()
        return prompts, completions

    @property
    def ended(self) -> Tensor:
        """Whether the completion ended by itself, with an end token or a stop string, (B,)."""
        return self.has_eos | self._stopped if self.stop else self.has_eos

    @property
    def has_eos(self) -> Tensor:
        """Whether the completion ended with an end token, (B,)."""
        last = self.completion_ids.gather(1, self.lengths.unsqueeze(1) - 1).squeeze(1)
        return torch.isin(last, torch.tensor(self.eos_ids, dtype=last.dtype, device=last.device))

    @cached_property
    def _stopped(self) -> Tensor:
        """Whether the last token completes a stop string, (B,); earlier turns may have ended with one."""
        rows = [ids[:n] for ids, n in zip(self.completion_ids.tolist(), self.lengths.tolist(), strict=True)]
        whole, before = (
            self.tokenizer.batch_decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for part in (rows, [ids[:-1] for ids in rows])
        )
        found = [
            any(one.count(words) > two.count(words) for words in self.stop)
            for one, two in zip(whole, before, strict=True)
        ]
        return torch.tensor(found, device=self.completion_ids.device)

    @cached_property
    def layout(self) -> Groups:
        """The table of completions by prompt."""
        return group_by(self.groups)

    @property
    def prompt_keys(self) -> list[int]:
        """A number for each completion's prompt, the same in every batch: :func:`.prompts.prompt_keys`."""
        return prompt_keys(self.prompt_ids, self.prompt_mask)

    @property
    def group_keys(self) -> list[int]:
        """The same for each group, in the order of :attr:`layout`."""
        first = (self.layout.column == 0).nonzero().squeeze(1)
        rows = first[self.layout.row[first].argsort()].to(self.prompt_ids.device)
        return prompt_keys(self.prompt_ids[rows], self.prompt_mask[rows])

    # ---- sampled positions, one after another -------------------------------------------------------------------

    @cached_property
    def positions(self) -> Tensor:
        """Which of the B·T positions were sampled, (n,); nothing is computed at the others."""
        return self.sampled.flatten().nonzero().squeeze(1)

    @cached_property
    def tokens(self) -> Tensor:
        """The sampled tokens, (n,)."""
        tokens: Tensor = self.completion_ids.flatten()[self.positions]
        return tokens

    @cached_property
    def offsets(self) -> Tensor:
        """How many sampled tokens of the same turn precede each sampled token, (n,)."""
        before = self.sampled.long().cumsum(-1) - self.sampled.long()
        if self.turns is not None:
            begins = torch.nn.functional.pad(self.turns.diff(dim=-1) != 0, (1, 0), value=True)
            before = before - before.masked_fill(~begins, 0).cummax(-1).values
        return self.take(before)

    def take(self, values: Tensor) -> Tensor:
        """Values at the sampled positions; (B, T, …) → (n, …)."""
        taken: Tensor = values.flatten(0, 1)[self.positions]
        return taken

    def put(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`take`, with 0 at the other positions; (n, …) → (B, T, …)."""
        shape = self.completion_ids.shape
        whole = values.new_zeros(shape.numel(), *values.shape[1:])
        filled: Tensor = whole.index_copy(0, self.positions, values).view(*shape, *values.shape[1:])
        return filled

    # ---- text ---------------------------------------------------------------------------------------------------

    @cached_property
    def prompts(self) -> list[str]:
        """Text of the prompts."""
        return self._decode(self.prompt_ids, self.prompt_mask)

    @cached_property
    def completions(self) -> list[str]:
        """Text of the completions."""
        return self._decode(self.completion_ids, self.completion_mask)

    def _decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        rows = [row[keep.bool()] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    # ---- select, join, pack -------------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> "Rollout":
        """Some of the sequences, without the columns that are padding in all of them.

        Args:
            rows: their numbers, (b,).
        """
        starts, lengths = self.prompt_mask[rows].int().argmax(-1), self.lengths[rows]
        first, length = (int(starts.min()), int(lengths.max())) if len(rows) else (0, self.completion_ids.shape[1])
        columns = {name: [values[i] for i in rows.tolist()] for name, values in self.columns.items()}
        prompts = {name: getattr(self, name)[rows, first:] for name in self._PROMPT}
        tokens = {name: value[rows, :length] for name, value in self.tokenwise().items()}
        changes: dict[str, Any] = {"columns": columns, "groups": self.groups[rows.cpu()], **prompts, **tokens}
        return replace(self, **changes)

    @classmethod
    def join(cls, rollouts: "list[Rollout]") -> "Rollout":
        """All sequences of several rollouts, padded to the longest; their groups stay apart."""
        first, pad_id = rollouts[0], rollouts[0].tokenizer.pad_token_id
        tensors: dict[str, Any] = {}
        for name in (*cls._PROMPT, *first.tokenwise()):
            parts, left = [getattr(r, name) for r in rollouts], name in cls._PROMPT
            short = [max(part.shape[1] for part in parts) - part.shape[1] for part in parts]
            fill = pad_id if name.endswith("_ids") else 0
            tensors[name] = torch.cat(
                [pad(part, (n, 0) if left else (0, n), value=fill) for part, n in zip(parts, short, strict=True)]
            )
        columns = {name: [v for r in rollouts for v in r.columns[name]] for name in first.columns}
        labels, taken = [], 0
        for rollout in rollouts:
            labels.append(rollout.layout.row + taken)
            taken += rollout.layout.shape[0]
        return replace(first, columns=columns, groups=torch.cat(labels), **tensors)

    def pack(self) -> dict[str, Any]:
        """Tensors and plain values alone, as a checkpoint may hold them; without columns of anything else."""
        tensors = {name: getattr(self, name) for name in self._PROMPT} | self.tokenwise()
        packed = {name: tensor.cpu() for name, tensor in tensors.items()}
        columns = {name: values for name, values in self.columns.items() if _is_plain(values)}
        return packed | {"groups": self.groups, "eos_ids": self.eos_ids, "stop": self.stop, "columns": columns}

    @classmethod
    def unpack(cls, packed: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> "Rollout":
        """The inverse of :meth:`pack`."""
        return cls(**{"engine_logps": None} | packed, tokenizer=tokenizer)

    def tokenwise(self) -> dict[str, Tensor]:
        """What has one value for each token of the completions."""
        return {name: value for name in self._TOKENS if (value := getattr(self, name)) is not None}


def _is_plain(value: Any) -> bool:
    """Whether it is made of what `torch.load(weights_only=True)` reads; a number of NumPy's is not."""
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return value is None or type(value) in (str, int, float, bool)
