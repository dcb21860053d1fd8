"""Relaxed sampling: every token is a Gumbel-softmax mixture, and one graph runs through all steps."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.gumbel import exponential_noise, relaxed_tokens, soft_embeddings
from grade_lightning.functional.sequences import position_ids
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, RelaxedRollout

from .caches import keys_and_values
from .distribution import Distribution


class _Steps(NamedTuple):
    """What a block of n steps hands on."""

    inputs: Tensor
    """(B, 1, width): the next input."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values that each layer added."""
    mask: Tensor
    """(B, L): attention mask so far."""
    ended: Tensor
    """(B,)"""
    tokens: Tensor
    """(B, n)"""
    logps: Tensor
    """(B, n)"""
    weights: Tensor
    """(B, n, k)"""
    indices: Tensor
    """(B, n, k)"""
    logits: Tensor
    """(B, n, V)"""


class RelaxedEngine:
    """Soft completions by a policy that is fed its own soft tokens, through the key-value cache.

    With s = log p + Gumbel noise, p the distribution, the token of a step is argmax s: an exact sample of p given the
    soft tokens before it. The soft token softmax(s / τ) is what the next step and the reward see. A completion ends
    where its argmax ends it.

    The graph runs through everything that the objective depends on, the embedding table included if it is trained.
    Activations of one block of steps are alive at a time: the backward pass computes each block again with the same
    noise. Of earlier blocks there are keys and values, logits and weights, which grow linearly with the length. Dropout
    is off, LoRA's included, so that the policy that learns is the one that is sampled.

    Args:
        block: steps in a block; from `max_new_tokens` on nothing is computed twice.

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574
        | Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2017), https://arxiv.org/abs/1611.01144
        | Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016), https://arxiv.org/abs/1604.06174
    """

    def __init__(self, block: int = 8) -> None:
        check_range("[1, inf)", block=block)
        self.block = block

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts, tau: float) -> RelaxedRollout:
        """Sample one soft completion for each prompt, with the global random state.

        Args:
            policy: the policy; in evaluation mode whatever mode it is in.
            distribution: of the tokens; its top-k is the support of the soft tokens (of tokens that tie for the last
                place some are left out), without one it is the whole vocabulary.
            prompts: B prompts.
            tau: temperature τ of the soft tokens.

        Raises:
            InputError: the policy keeps a recurrent state, not keys and values.
        """
        input_ids = prompts.ids
        if keys_and_values(policy) is None:
            raise InputError(
                f"{policy.path}: keeps a recurrent state, and relaxed sampling needs keys and values; use GradeSTE"
            )
        longest = distribution.max_new_tokens
        vocabulary = torch.arange(policy.anatomy.size, device=input_ids.device)
        inputs, table = policy.embed(input_ids), policy.embed(vocabulary)
        mask, ended = prompts.mask, input_ids.new_zeros(len(input_ids), dtype=torch.bool)
        blocks: list[_Steps] = []
        for start in range(0, longest, self.block):
            steps = range(start, min(start + self.block, longest))
            past = tuple(block.past for block in blocks)
            arguments = (policy, distribution, tau, steps, inputs, table, past, mask, ended)
            if self.block < longest:
                done: _Steps = checkpoint(self._steps, *arguments, use_reentrant=False)
            else:
                done = self._steps(*arguments)
            blocks.append(done)
            inputs, mask, ended = done.inputs, done.mask, done.ended
            if ended.all():
                break
        completion_mask = mask[:, input_ids.shape[1] :].bool()
        length = int(completion_mask.sum(-1).max())
        completion_mask = completion_mask[:, :length]
        tokens, logps, weights, indices, logits = (
            torch.cat(parts, dim=1)[:, :length] for parts in zip(*(block[4:] for block in blocks), strict=True)
        )
        return RelaxedRollout(
            prompt_ids=input_ids,
            prompt_mask=prompts.mask,
            completion_ids=tokens.masked_fill(~completion_mask, policy.tokenizer.pad_token_id),
            completion_mask=completion_mask,
            engine_logps=logps.masked_fill(~completion_mask, 0),
            tokenizer=policy.tokenizer,
            columns=prompts.columns,
            eos_ids=policy.eos_ids,
            weights=weights,
            indices=indices,
            logits=logits,
            tau=tau,
        )

    def _steps(
        self,
        policy: Policy,
        distribution: Distribution,
        tau: float,
        steps: range,
        inputs: Tensor,
        table: Tensor,
        past: tuple[tuple[tuple[Tensor, Tensor], ...], ...],
        mask: Tensor,
        ended: Tensor,
    ) -> _Steps:
        """Some steps, as a function of its arguments and the random state alone: it runs once more in the backward."""
        layers = (zip(*layer, strict=True) for layer in zip(*past, strict=True))
        cache = DynamicCache([tuple(torch.cat(slices, dim=2) for slices in layer) for layer in layers] or None)
        seen = mask.shape[1] - inputs.shape[1]
        eos = torch.tensor(policy.eos_ids, dtype=torch.long, device=mask.device)
        taken = []
        with policy.evaluating() as model:
            for step in steps:
                logits = model(
                    inputs_embeds=inputs,
                    attention_mask=mask,
                    position_ids=position_ids(mask)[:, -inputs.shape[1] :],
                    use_cache=True,
                    logits_to_keep=1,
                    **{policy.cache_name: cache},
                ).logits
                whole = distribution.logits(logits, policy.eos_ids, positions=step)
                values, indices = _support(whole, distribution.top_k)
                logps = values.log_softmax(-1)
                scores = logps - exponential_noise(logps).clamp(min=torch.finfo(logps.dtype).tiny).log()
                weights = relaxed_tokens(scores, tau)
                index = scores.argmax(-1, keepdim=True)
                token = indices.gather(-1, index)[..., 0]
                taken.append((token, logps.detach().gather(-1, index)[..., 0], weights, indices, logits))
                inputs = soft_embeddings(weights, indices, table)
                mask = torch.cat([mask, (~ended).to(mask.dtype).unsqueeze(1)], dim=1)
                ended = ended | torch.isin(token[:, 0], eos)
        added = tuple((keys[:, :, seen:].clone(), values[:, :, seen:].clone()) for keys, values, _ in cache)
        parts = (torch.cat(part, dim=1) for part in zip(*taken, strict=True))
        return _Steps(inputs, added, mask, ended, *parts)


def _support(logits: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """The k largest logits and their tokens; all of them without a k."""
    size = logits.shape[-1]
    if k is None or k >= size:
        return logits, torch.arange(size, device=logits.device).expand_as(logits)
    values, indices = logits.topk(k, dim=-1)
    return values, indices
