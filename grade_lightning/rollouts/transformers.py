"""Sampling with a transformers model itself."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grade_lightning.errors import DivergenceError, InputError, check_range
from grade_lightning.functional.drawing import draw
from grade_lightning.functional.sequences import completion_mask, position_ids, token_logps
from grade_lightning.numerics import forked_generators
from grade_lightning.policies import Policy
from grade_lightning.policies.anatomy import some_tokens
from grade_lightning.policies.prepacked import prepacked
from grade_lightning.records import Prompts, Rollout

from .caches import keys_and_values
from .distribution import Distribution
from .engine import Engine
from .stopping import stopped

Caching = Literal["shared", "own", "static", "none"]
"""Prompts in a row that are the same are read once; the model's own cache; one of fixed size; no cache."""
FEWEST = 16
"""Tokens of a completion from which on copying the weights costs less than it gains."""


class TransformersEngine(Engine):
    """Batched sampling with the policy itself; prompts in a row that are the same are read once.

    Models that keep something other than keys and values are sampled by `generate` of transformers.

    How a model can be cached is tried on a few tokens: the fastest way whose log-probabilities are those of the
    training pass is taken.

    Args:
        block: tokens after which completions that have ended leave the batch.
        static_cache: keys and values in tensors of fixed size: on a GPU transformers then compiles the decoding step.
            Prompts are not shared then, and ended completions stay in the batch.
        bfloat16: compute in bfloat16, while the weights stay as they are: faster on a processor that multiplies in it.
            Tokens are then drawn from a slightly different distribution, for which the method's `correction` makes up.
        prepack: on a processor, draw with copies of the weights of the linear layers, in a layout that is faster for
            few rows, where adapters are added to the weights. The copies take as much memory as the weights while it
            draws.
    """

    def __init__(
        self, block: int = 16, static_cache: bool = False, bfloat16: bool = False, prepack: bool = True
    ) -> None:
        check_range("[1, inf)", "engine", block=block)
        self.block = block
        self.static_cache = static_cache
        self.bfloat16 = bfloat16
        self.prepack = prepack
        self._caching: tuple[int, Caching] | None = None

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """Sample one completion for each prompt.

        Raises:
            DivergenceError: the policy's distribution is not a number.
            InputError: whatever the cache, the model samples from another distribution than it is trained on.
        """
        if self._caching is None or self._caching[0] != id(policy.base):
            self._caching = id(policy.base), self._choose(policy)
        pack = self.prepack and distribution.max_new_tokens >= FEWEST
        return self._draw(policy, distribution, prompts, self._caching[1], self.block, pack)

    def _choose(self, policy: Policy) -> Caching:
        """The first way of caching that passes a trial."""
        name, reason = f"{policy.path}: {type(policy.base).__name__}", ""
        ways: list[Caching] = ["static"] if self.static_cache else ["shared", "own", "none"]
        if keys_and_values(policy) is None and not self.static_cache:
            ways.remove("shared")
        for way in ways:
            try:
                gap, allowed = self._trial(policy, way)
            except DivergenceError:
                raise
            except Exception as error:  # the model's own code, in which anything may fail
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if gap <= allowed:
                if way == "none":
                    rank_zero_warn(f"{name} samples correctly only without a cache ({reason}), which is slow")
                return way
            reason = f"its log-probabilities differ (by {gap:.2g} nats a token)"
        raise InputError(f"{name} cannot be sampled as it is trained: with every cache {reason}")

    @torch.no_grad()
    def _trial(self, policy: Policy, way: Caching) -> tuple[float, float]:
        """How far log-probabilities are from the training pass's, and how far they may be."""
        ids = some_tokens(policy.base, 2, 5)[[0, 0, 1]]
        mask = torch.ones_like(ids)
        mask[-1, :2] = 0
        with forked_generators(policy.base.device), policy.evaluating():
            torch.manual_seed(0)
            few, prompts = Distribution(max_new_tokens=3), Prompts(ids, mask)
            rollout = self._draw(policy, few, prompts, way, block=1, pack=self.prepack)
            inputs, length = policy.embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
            logits = policy.logits(inputs, rollout.mask[:, :-1], length)
        found = token_logps(Distribution().log_distribution(logits), rollout.completion_ids)
        assert rollout.engine_logps is not None
        half = policy.dtype in (torch.bfloat16, torch.float16)
        reduced = half or self.bfloat16 or torch.is_autocast_enabled(ids.device.type)
        return float((found - rollout.engine_logps).abs()[rollout.sampled].mean()), 0.1 if reduced else 1e-3

    @torch.no_grad()
    def _draw(
        self, policy: Policy, distribution: Distribution, prompts: Prompts, way: Caching, block: int, pack: bool
    ) -> Rollout:
        input_ids, longest = prompts.ids, distribution.max_new_tokens
        eos_ids, pad_id, width = policy.eos_ids, policy.tokenizer.pad_token_id, input_ids.shape[1]
        completion = input_ids.new_full((len(input_ids), longest), pad_id)
        logps = torch.zeros(completion.shape, dtype=torch.float32, device=input_ids.device)
        ids, mask, live = input_ids, prompts.mask, torch.arange(len(input_ids), device=input_ids.device)
        ends, done = torch.tensor(eos_ids, dtype=ids.dtype, device=ids.device), 0
        cast = torch.autocast(ids.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()
        with ExitStack() as stack:
            model = stack.enter_context(policy.evaluating())
            stack.enter_context(_without_own_settings(policy.base))
            stack.enter_context(cast)
            if pack:
                stack.enter_context(prepacked(model))
            cache = _shared_prefill(policy, ids, mask) if way == "shared" else None
            block = longest if cache is None else block
            while done < longest and len(live):
                count = min(block, longest - done)
                if cache is None:
                    recorder = _Recorder(distribution, eos_ids, width)
                    new = model.generate(  # type: ignore[operator]
                        input_ids=ids,
                        attention_mask=mask,
                        generation_config=_settings(count, eos_ids, pad_id, way),
                        logits_processor=LogitsProcessorList([recorder]),
                        synced_gpus=False,  # under FSDP it would wait for processes that have nothing left to draw
                    )[:, width:]
                    found = recorder.logps(new.shape[1])
                else:
                    steps = range(done, done + count)
                    new, found = _continued(policy, distribution, ids, mask, cache, steps, eos_ids)
                ids, span = torch.cat([ids, new], dim=1), slice(done, done + new.shape[1])
                completion[live, span], logps[live, span] = new, found.to(logps.dtype)
                if bool(logps[live, span].isnan().any()):
                    raise DivergenceError(
                        "the policy gives no probabilities: it has diverged; lower --model.optimizer.lr"
                    )
                done, mask = span.stop, pad(mask, (0, new.shape[1]), value=1)
                over = torch.isin(new, ends).any(-1)
                if distribution.stop:
                    over |= stopped(policy.tokenizer, completion[live, :done], distribution.stop)
                going = (~over).nonzero().squeeze(1)
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


def _settings(length: int, eos_ids: list[int], pad_id: int, way: Caching) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,  # the recorder draws
        max_new_tokens=length,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        use_cache=way != "none",
        cache_implementation="static" if way == "static" else None,
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
    cache = keys_and_values(policy)
    assert cache is not None
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


def _continued(
    policy: Policy,
    distribution: Distribution,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    steps: range,
    eos_ids: list[int],
) -> tuple[Tensor, Tensor]:
    """Some more tokens of each completion and their log-probabilities, until all have ended.

    `generate` does the same; around a small network it takes longer than the network.
    """
    read, taken = ids.shape[1], list[Tensor]()
    ends, last = torch.tensor(eos_ids, dtype=ids.dtype, device=ids.device), ids[:, -1]
    over, tokens = torch.zeros_like(last, dtype=torch.bool), list[Tensor]()
    mask = pad(mask, (0, len(steps)), value=1)
    places = mask[:, :read].sum(-1, keepdim=True) - 1
    for count, step in enumerate(steps):
        logits = policy.model(
            input_ids=last.unsqueeze(1),
            attention_mask=mask[:, : read + count],
            position_ids=places + count,
            use_cache=True,
            logits_to_keep=1,
            **{policy.cache_name: cache},
        ).logits[:, -1]
        logps = distribution.logits(logits, eos_ids, positions=step).log_softmax(-1)
        last = draw(logps).masked_fill(over, policy.tokenizer.pad_token_id)
        tokens.append(last)
        taken.append(token_logps(logps, last))
        over |= torch.isin(last, ends)
        if bool(over.all()):
            break
    return torch.stack(tokens, dim=1), torch.stack(taken, dim=1)


class _Recorder(LogitsProcessor):
    """Draws the tokens, and keeps the log-probability of each instead of all scores."""

    def __init__(self, distribution: Distribution, eos_ids: list[int], prompt_length: int) -> None:
        self.distribution = distribution
        self.eos_ids = eos_ids
        self.prompt_length = prompt_length
        self.taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of which the drawn tokens' are the largest."""
        position = input_ids.shape[1] - self.prompt_length
        logps = self.distribution.logits(scores, self.eos_ids, positions=position).log_softmax(-1)
        tokens = draw(logps)
        self.taken.append(token_logps(logps, tokens))
        return torch.full_like(logps, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)

    def logps(self, length: int) -> Tensor:
        """Of the first `length` tokens, (B, length); on a GPU transformers takes a step too many and undoes it."""
        return torch.stack(self.taken[:length], dim=1)
