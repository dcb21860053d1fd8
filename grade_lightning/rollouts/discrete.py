"""Ordinary sampling: prompts in, completions and their log-probabilities out."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import completion_mask, token_logps, truncate_logits
from grade_lightning.policies import Policy


@dataclass
class Rollout:
    """Sampled completions. B sequences, P prompt tokens (padded on the left), T completion tokens.

    The completion ends with its end-of-sequence token, which belongs to it; what follows is padding.
    """

    prompt_ids: Tensor
    """(B, P)"""
    prompt_mask: Tensor
    """(B, P), 0 for padding."""
    completion_ids: Tensor
    """(B, T)"""
    completion_mask: Tensor
    """(B, T), bool: true up to and including the end-of-sequence token."""
    logps: Tensor
    """(B, T), float32: log-probabilities under the distribution that was sampled; 0 after the end."""
    tokenizer: PreTrainedTokenizerBase
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The other columns of the rows, handed to reward functions by name."""
    eos_ids: list[int] = field(default_factory=list)

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
        """Number of completion tokens, (B,)."""
        return self.completion_mask.sum(-1)

    @property
    def ended(self) -> Tensor:
        """Whether the completion ended by itself, (B,)."""
        last = self.completion_ids.gather(1, self.lengths.unsqueeze(1) - 1).squeeze(1)
        return torch.isin(last, torch.tensor(self.eos_ids, dtype=last.dtype, device=last.device))

    @cached_property
    def valid(self) -> Tensor:
        """Which of the B·T positions belong to completions, (n,): what follows an end is not computed."""
        return self.completion_mask.flatten().nonzero().squeeze(1)

    @cached_property
    def tokens(self) -> Tensor:
        """The tokens at :attr:`valid`, (n,)."""
        tokens: Tensor = self.completion_ids.flatten()[self.valid]
        return tokens

    def packed(self, values: Tensor) -> Tensor:
        """The valid positions of a tensor; (B, T, …) → (n, …)."""
        taken: Tensor = values.flatten(0, 1)[self.valid]
        return taken

    def unpacked(self, values: Tensor) -> Tensor:
        """Valid positions put back where they belong, 0 elsewhere; (n, …) → (B, T, …)."""
        shape = self.completion_ids.shape
        whole = values.new_zeros(shape.numel(), *values.shape[1:])
        filled: Tensor = whole.index_copy(0, self.valid, values).view(*shape, *values.shape[1:])
        return filled

    @cached_property
    def prompts(self) -> list[str]:
        """Text of the prompts."""
        return self._decode(self.prompt_ids, self.prompt_mask)

    @cached_property
    def completions(self) -> list[str]:
        """Text of the completions."""
        return self._decode(self.completion_ids, self.completion_mask)

    def select(self, rows: Tensor) -> "Rollout":
        """Some of the sequences.

        Args:
            rows: their numbers, (b,).
        """
        tensors = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "logps")
        columns = {name: [values[i] for i in rows.tolist()] for name, values in self.columns.items()}
        return replace(self, columns=columns, **{name: getattr(self, name)[rows] for name in tensors})

    @classmethod
    def join(cls, rollouts: "list[Rollout]") -> "Rollout":
        """All sequences of several rollouts, of prompts that are padded to the same width."""
        first, longest = rollouts[0], max(r.completion_ids.shape[1] for r in rollouts)
        fill = {"completion_ids": first.tokenizer.pad_token_id, "completion_mask": False, "logps": 0.0}
        tensors: dict[str, Any] = {
            name: torch.cat(
                [pad(getattr(r, name), (0, longest - r.completion_ids.shape[1]), value=value) for r in rollouts]
            )
            for name, value in fill.items()
        }
        tensors |= {name: torch.cat([getattr(r, name) for r in rollouts]) for name in ("prompt_ids", "prompt_mask")}
        columns = {name: [v for r in rollouts for v in r.columns[name]] for name in first.columns}
        return replace(first, columns=columns, **tensors)

    def _decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        rows = [row[keep.bool()] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


class Sampler:
    """Batched sampling over `generate` of transformers.

    The distribution that is sampled is computed by :meth:`logits`, here and in every training pass alike, so the two
    cannot drift apart.

    Args:
        max_new_tokens: longest completion.
        min_new_tokens: the end-of-sequence token is masked before that many tokens.
        temperature: divides the logits.
        top_k: sample from the k most likely tokens (the paper's restriction for the relaxed tokens is 256).
        top_p: sample from the smallest set of tokens that holds this mass.

    Example:
        >>> Sampler(temperature=0.5).logits(torch.tensor([[[1.0, 2.0]]]), eos_ids=[0])
        tensor([[[2., 4.]]])
    """

    def __init__(
        self,
        max_new_tokens: int = 48,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> None:
        for name, value, fits in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("min_new_tokens", min_new_tokens, 0 <= min_new_tokens <= max_new_tokens),
            ("temperature", temperature, temperature > 0),
            ("top_k", top_k, top_k is None or top_k >= 1),
            ("top_p", top_p, 0 < top_p <= 1),
        ):
            if not fits:
                raise InputError(f"sampler.{name} = {value}: out of range; nothing can be generated with it")
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p

    @property
    def restricts(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.top_k is not None or self.top_p < 1 or self.min_new_tokens > 0

    def log_distribution(self, logits: Tensor) -> Tensor:
        """Log-probabilities at the sampling temperature with nothing masked: what KL and entropy are taken of.

        Args:
            logits: (…, V).

        Returns:
            (…, V), float32 or better.
        """
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).log_softmax(-1)

    def logits(
        self, logits: Tensor, eos_ids: list[int], tokens: Tensor | None = None, positions: Tensor | int | None = None
    ) -> Tensor:
        """Logits of the distribution that is sampled, in float32 or better.

        Args:
            logits: the policy's, (…, V).
            eos_ids: end-of-sequence tokens.
            tokens: the tokens that were sampled, (…). They are kept in the support even where rounding, another
                batch or another kernel would put them just outside of the top-k or top-p set.
            positions: which position of its completion each is, (…); they count along the last dimension by default.

        Returns:
            (…, V); −inf outside of the support.
        """
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        restricted = scaled
        if self.min_new_tokens > 0 and eos_ids:
            if positions is None:
                positions = torch.arange(logits.shape[-2], device=logits.device)
            early = torch.as_tensor(positions < self.min_new_tokens, device=logits.device).unsqueeze(-1)
            restricted = restricted.clone()
            restricted[..., eos_ids] = restricted[..., eos_ids].masked_fill(early, -torch.inf)
        restricted = truncate_logits(restricted, self.top_k, self.top_p)
        if tokens is not None and restricted is not scaled:
            index = tokens.unsqueeze(-1)
            restricted = restricted.scatter(-1, index, scaled.gather(-1, index))
        return restricted

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: dict[str, list[Any]] | None = None,
    ) -> Rollout:
        """Sample one completion for each prompt, with the global random state.

        Args:
            policy: the policy; sampled in evaluation mode whatever mode it is in.
            input_ids: prompts, (B, P), padded on the left.
            attention_mask: (B, P).
            columns: other columns of the rows.
        """
        eos_ids = policy.eos_ids
        recorder = _Recorder(self, eos_ids, input_ids.shape[1])
        config = GenerationConfig(
            do_sample=True,
            max_new_tokens=self.max_new_tokens,
            temperature=1.0,  # the recorder makes the distribution
            top_k=0,
            top_p=1.0,
            eos_token_id=eos_ids or None,
            pad_token_id=policy.tokenizer.pad_token_id,
            use_cache=True,
        )
        with policy.evaluating() as model:
            base, own = policy.base, policy.base.generation_config
            base.generation_config = GenerationConfig()  # a model's own penalties would be merged into ours
            try:
                ids: Tensor = model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([recorder]),
                )
            finally:
                base.generation_config = own
        completion = ids[:, input_ids.shape[1] :]
        mask = completion_mask(completion, eos_ids)
        return Rollout(
            prompt_ids=input_ids,
            prompt_mask=attention_mask,
            completion_ids=completion,
            completion_mask=mask,
            logps=recorder.logps(ids).masked_fill(~mask, 0),
            tokenizer=policy.tokenizer,
            columns=columns or {},
            eos_ids=eos_ids,
        )


class _Recorder(LogitsProcessor):
    """Makes the sampled distribution, and keeps each sampled token's log-probability instead of all scores."""

    def __init__(self, sampler: Sampler, eos_ids: list[int], prompt_length: int) -> None:
        self.sampler = sampler
        self.eos_ids = eos_ids
        self.prompt_length = prompt_length
        self.last: Tensor | None = None
        self.taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        position = input_ids.shape[1] - self.prompt_length
        self.last = self.sampler.logits(scores, self.eos_ids, positions=position).log_softmax(-1)
        return self.last

    def _take(self, ids: Tensor) -> None:
        if self.last is not None:
            self.taken.append(token_logps(self.last, ids[:, -1]))

    def logps(self, ids: Tensor) -> Tensor:
        self._take(ids)
        return torch.stack(self.taken, dim=1)
