"""Sampling by `generate` of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grade_lightning.errors import DivergenceError, check_range
from grade_lightning.functional.sequences import completion_mask, position_ids, token_logps
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution
from .engine import Engine


class TransformersEngine(Engine):
    """Batched sampling over `generate` of transformers; prompts in a row that are the same are read once.

    Args:
        block: tokens after which completions that have ended leave the batch.
        static_cache: keys and values in tensors of fixed size: on a GPU transformers then compiles the decoding step.
            Prompts are not shared then, and ended completions stay in the batch.
    """

    def __init__(self, block: int = 16, static_cache: bool = False) -> None:
        check_range("[1, inf)", "engine", block=block)
        self.block = block
        self.static_cache = static_cache

    @torch.no_grad()
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """Sample one completion for each prompt.

        Raises:
            DivergenceError: the policy's distribution is not a number.
        """
        input_ids, longest = prompts.ids, distribution.max_new_tokens
        eos_ids, pad_id, width = policy.eos_ids, policy.tokenizer.pad_token_id, input_ids.shape[1]
        completion = input_ids.new_full((len(input_ids), longest), pad_id)
        logps = torch.zeros(completion.shape, dtype=torch.float32, device=input_ids.device)
        ids, mask, live = input_ids, prompts.mask, torch.arange(len(input_ids), device=input_ids.device)
        ends, done = torch.tensor(eos_ids, dtype=ids.dtype, device=ids.device), 0
        with policy.evaluating() as model, _without_own_settings(policy.base):
            cache = None if self.static_cache or policy.base._is_stateful else _shared_prefill(policy, ids, mask)
            block = longest if cache is None else self.block
            while done < longest and len(live):
                recorder = _Recorder(distribution, eos_ids, width)
                ids = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=self._settings(min(block, longest - done), eos_ids, pad_id),
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
            prompt_mask=prompts.mask,
            completion_ids=completion[:, :done],
            completion_mask=mask,
            engine_logps=logps[:, :done].masked_fill(~mask, 0),
            tokenizer=policy.tokenizer,
            columns=prompts.columns,
            eos_ids=eos_ids,
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

    def __init__(self, distribution: Distribution, eos_ids: list[int], prompt_length: int) -> None:
        self.distribution = distribution
        self.eos_ids = eos_ids
        self.prompt_length = prompt_length
        self.last: Tensor | None = None
        self.taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        position, began = input_ids.shape[1] - self.prompt_length, self.last is not None
        self.last = self.distribution.logits(scores, self.eos_ids, positions=position).log_softmax(-1)
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
