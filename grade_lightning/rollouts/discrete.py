"""Ordinary sampling: prompts in, completions and their log-probabilities out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import record_function
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grade_lightning.errors import DivergenceError, check_range
from grade_lightning.functional.sequences import completion_mask, position_ids, token_logps, truncate_logits
from grade_lightning.policies import Policy

_COMPLETION = ("completion_ids", "completion_mask", "logps")


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

    def __post_init__(self) -> None:
        """Wait for the device here, where a sampler waits anyway, and not in the training pass."""
        _ = self.valid

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
        """Some of the sequences, without the columns that are padding in all of them.

        Args:
            rows: their numbers, (b,).
        """
        first, length = self._extent(rows)
        columns = {name: [values[i] for i in rows.tolist()] for name, values in self.columns.items()}
        prompts = {name: getattr(self, name)[rows, first:] for name in ("prompt_ids", "prompt_mask")}
        completions = {name: getattr(self, name)[rows, :length] for name in _COMPLETION}
        return replace(self, columns=columns, **prompts, **completions)

    def _extent(self, rows: Tensor) -> tuple[int, int]:
        """The first column of the prompts that is not padding everywhere, and the longest completion."""
        starts, lengths = self.prompt_mask[rows].int().argmax(-1), self.lengths[rows]
        return (int(starts.min()), int(lengths.max())) if len(rows) else (0, self.completion_ids.shape[1])

    @classmethod
    def join(cls, rollouts: "list[Rollout]") -> "Rollout":
        """All sequences of several rollouts, padded to the longest."""
        first, pad_id = rollouts[0], rollouts[0].tokenizer.pad_token_id
        fill = {
            "prompt_ids": pad_id,
            "prompt_mask": 0,
            "completion_ids": pad_id,
            "completion_mask": False,
            "logps": 0.0,
        }
        tensors: dict[str, Any] = {}
        for name, value in fill.items():
            parts, left = [getattr(r, name) for r in rollouts], name not in _COMPLETION
            short = [max(part.shape[1] for part in parts) - part.shape[1] for part in parts]
            tensors[name] = torch.cat(
                [pad(part, (n, 0) if left else (0, n), value=value) for part, n in zip(parts, short, strict=True)]
            )
        columns = {name: [v for r in rollouts for v in r.columns[name]] for name in first.columns}
        return replace(first, columns=columns, **tensors)

    def _decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        rows = [row[keep.bool()] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


class Sampler:
    """Batched sampling over `generate` of transformers; prompts in a row that are the same are read once.

    The distribution that is sampled is computed by :meth:`logits`, here and in every training pass alike, so the two
    cannot drift apart.

    Args:
        max_new_tokens: longest completion.
        min_new_tokens: the end-of-sequence token is masked before that many tokens.
        temperature: divides the logits.
        top_k: sample from the k most likely tokens (the paper's restriction for the relaxed tokens is 256).
        top_p: sample from the smallest set of tokens that holds this mass.
        block: tokens after which completions that have ended leave the batch.
        static_cache: keys and values in tensors of fixed size: on a GPU transformers then compiles the decoding step.
            Prompts are not shared then, and ended completions stay in the batch.

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
        block: int = 16,
        static_cache: bool = False,
    ) -> None:
        check_range("[1, inf)", "sampler", max_new_tokens=max_new_tokens, top_k=top_k, block=block)
        check_range(f"[0, {max_new_tokens}]", "sampler", min_new_tokens=min_new_tokens)
        check_range("(0, inf)", "sampler", temperature=temperature)
        check_range("(0, 1]", "sampler", top_p=top_p)
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.block = block
        self.static_cache = static_cache

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
        return self.tempered(logits).log_softmax(-1)

    def tempered(self, values: Tensor) -> Tensor:
        """Divided by the temperature, in float32 or better: logits, or a cotangent on its way to them."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values if self.temperature == 1 else values / self.temperature

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
        scaled = self.tempered(logits)
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

    @record_function("sampling")
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

        Raises:
            DivergenceError: the policy's distribution is not a number.
        """
        eos_ids, pad_id, width = policy.eos_ids, policy.tokenizer.pad_token_id, input_ids.shape[1]
        completion = input_ids.new_full((len(input_ids), self.max_new_tokens), pad_id)
        logps = torch.zeros(completion.shape, dtype=torch.float32, device=input_ids.device)
        ids, mask, live = input_ids, attention_mask, torch.arange(len(input_ids), device=input_ids.device)
        ends, done = torch.tensor(eos_ids, dtype=ids.dtype, device=ids.device), 0
        with policy.evaluating() as model, _without_own_settings(policy.base):
            cache = None if self.static_cache or policy.base._is_stateful else _shared_prefill(policy, ids, mask)
            block = self.max_new_tokens if cache is None else self.block
            while done < self.max_new_tokens and len(live):
                recorder = _Recorder(self, eos_ids, width)
                ids = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=self._settings(min(block, self.max_new_tokens - done), eos_ids, pad_id),
                    logits_processor=LogitsProcessorList([recorder]),
                    **({} if cache is None else {policy.cache_name: cache}),
                )
                new = ids[:, width + done :]
                span = slice(done, done + new.shape[1])
                completion[live, span], logps[live, span] = new, recorder.logps(ids, new.shape[1]).to(logps.dtype)
                done, mask = span.stop, pad(mask, (0, new.shape[1]), value=1)
                going = (~torch.isin(new, ends).any(-1)).nonzero().squeeze(1)
                if len(going) < len(live):
                    ids, mask, live = ids[going], mask[going], live[going]
                    if cache is not None:
                        cache.batch_select_indices(going)
        mask = completion_mask(completion[:, :done], eos_ids)
        return Rollout(
            prompt_ids=input_ids,
            prompt_mask=attention_mask,
            completion_ids=completion[:, :done],
            completion_mask=mask,
            logps=logps[:, :done].masked_fill(~mask, 0),
            tokenizer=policy.tokenizer,
            columns=columns or {},
            eos_ids=eos_ids,
        )

    def settings(self, policy: Policy) -> GenerationConfig:
        """With which `generate` of transformers samples from the same distribution by itself."""
        return GenerationConfig(
            do_sample=True,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            temperature=self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            eos_token_id=policy.eos_ids or None,
            pad_token_id=policy.tokenizer.pad_token_id,
            bos_token_id=policy.tokenizer.bos_token_id,
        )

    def _settings(self, length: int, eos_ids: list[int], pad_id: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            max_new_tokens=length,
            temperature=1.0,  # the recorder makes the distribution
            top_k=0,
            top_p=1.0,
            eos_token_id=eos_ids or None,
            pad_token_id=pad_id,
            use_cache=True,
            cache_implementation="static" if self.static_cache else None,
        )


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """A model's own penalties would be merged into ours."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _shared_prefill(policy: Policy, ids: Tensor, mask: Tensor) -> DynamicCache:
    """Keys and values of all tokens of the prompts but the last; of prompts that stand in a row they are made once."""
    cache = DynamicCache(config=policy.base.config.get_text_config())
    if ids.shape[1] > 1:
        _, number = torch.stack([ids, mask.to(ids.dtype)], -1).unique_consecutive(return_inverse=True, dim=0)
        first = torch.cat([number.new_ones(1), number.diff()]).nonzero().squeeze(1)
        seen = mask[first, :-1]
        policy.model(
            input_ids=ids[first, :-1],
            attention_mask=seen,
            position_ids=position_ids(seen),
            use_cache=True,
            logits_to_keep=1,
            **{policy.cache_name: cache},
        )
        if len(first) < len(ids):
            cache.batch_select_indices(number)
    return cache


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
        position, began = input_ids.shape[1] - self.prompt_length, self.last is not None
        self.last = self.sampler.logits(scores, self.eos_ids, positions=position).log_softmax(-1)
        if not began and bool(self.last.isnan().any()):  # looked at once, for that waits for a GPU
            raise DivergenceError("the policy gives no probabilities: it has diverged; lower --model.optimizer.lr")
        return self.last

    def _take(self, ids: Tensor) -> None:
        if self.last is not None:
            self.taken.append(token_logps(self.last, ids[:, -1]))

    def logps(self, ids: Tensor, length: int) -> Tensor:
        """Of the last `length` tokens, (B, length); on a GPU transformers takes a step too many and undoes it."""
        if len(self.taken) < length:
            self._take(ids)
        return torch.stack(self.taken[:length], dim=1)
