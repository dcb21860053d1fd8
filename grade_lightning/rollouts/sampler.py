"""How completions are drawn: settings, and the engine that follows them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.profiler import record_function
from transformers import GenerationConfig

from grade_lightning.errors import InputError, check_range
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution
from .engine import Engine
from .stopping import cut
from .transformers import TransformersEngine


class Sampler:
    """Draws completions with the same settings in training and in evaluation.

    Args:
        max_new_tokens: longest completion.
        min_new_tokens: the end-of-sequence token is masked before that many tokens.
        temperature: divides the logits.
        top_k: sample from the k most likely tokens (the paper's restriction for the relaxed tokens is 256).
        top_p: sample from the smallest set of tokens that holds this mass.
        engine: what draws them; `generate` of transformers by default.
        stop: a string, or several, that end a completion as an end token does; they belong to it.
        at_once: how many completions of a window are drawn at once; all by default. A reward that waits for
            something (a `RemoteJudge`, a `FunctionReward` in the background) is asked about one part while the next is
            drawn. The random numbers are others than of all at once.
        one_behind: train on the completions of the batch before while an engine that samples elsewhere draws those of
            this one. They are one rollout old: set a `correction`.

    Example:
        >>> Sampler(temperature=0.5).distribution.temperature
        0.5
    """

    def __init__(
        self,
        max_new_tokens: int = 48,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        engine: Engine | None = None,
        stop: str | list[str] | None = None,
        at_once: int | None = None,
        one_behind: bool = False,
    ) -> None:
        check_range("[1, inf)", "sampler", max_new_tokens=max_new_tokens, top_k=top_k, at_once=at_once)
        check_range(f"[0, {max_new_tokens}]", "sampler", min_new_tokens=min_new_tokens)
        check_range("(0, inf)", "sampler", temperature=temperature)
        check_range("(0, 1]", "sampler", top_p=top_p)
        strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in strings:
            raise InputError("sampler.stop: an empty string would end every completion; write another or leave it out")
        self.distribution = Distribution(max_new_tokens, min_new_tokens, temperature, top_k, top_p, strings)
        if one_behind and at_once is not None:
            raise InputError("sampler.one_behind: draws whole batches; leave out sampler.at_once")
        self.at_once = at_once
        self.one_behind = one_behind
        self.engine = engine or TransformersEngine()

    @property
    def max_new_tokens(self) -> int:
        """Longest completion."""
        return self.distribution.max_new_tokens

    @record_function("sampling")
    def __call__(self, policy: Policy, prompts: Prompts, groups: torch.Tensor | None = None, step: int = 0) -> Rollout:
        """Draw one completion for each prompt, with the global random state.

        Args:
            policy: the policy; sampled in evaluation mode whatever mode it is in.
            prompts: B prompts.
            groups: (B,): a label for each, the same for the completions of one prompt; None: each is by itself.
            step: optimizer steps that the policy's weights have behind them.
        """
        self.engine.sync(policy, step)
        return self.draw(policy, self.distribution, prompts, groups)

    def draw(
        self, policy: Policy, distribution: Distribution, prompts: Prompts, groups: torch.Tensor | None = None
    ) -> Rollout:
        """The same from another distribution, with the weights that the engine has."""
        return _finished(self.engine.generate(policy, distribution, prompts), distribution, groups)

    def begin(
        self, policy: Policy, prompts: Prompts, groups: torch.Tensor | None = None, step: int = 0
    ) -> Callable[[], Rollout]:
        """As a call, but the completions are waited for by what is returned."""
        self.engine.sync(policy, step)
        waiting = self.engine.start(policy, self.distribution, prompts)
        return lambda: _finished(waiting(), self.distribution, groups)

    def settings(self, policy: Policy) -> GenerationConfig:
        """Settings with which `generate` of transformers samples from the same distribution by itself."""
        own = self.distribution
        return GenerationConfig(
            do_sample=True,
            max_new_tokens=own.max_new_tokens,
            min_new_tokens=own.min_new_tokens or None,
            temperature=own.temperature,
            top_k=own.top_k or 0,
            top_p=own.top_p,
            eos_token_id=policy.eos_ids or None,
            pad_token_id=policy.tokenizer.pad_token_id,
            bos_token_id=policy.tokenizer.bos_token_id,
            stop_strings=list(own.stop) or None,
        )


def _finished(rollout: Rollout, distribution: Distribution, groups: torch.Tensor | None) -> Rollout:
    if not rollout.stop:  # an engine that knows of turns has ended each of them
        rollout = cut(rollout, distribution.stop)
    if int(rollout.lengths.max()) < rollout.completion_ids.shape[1]:  # the engine pads to a width of its own
        rollout = rollout.select(torch.arange(len(rollout.ids)))
    return rollout if groups is None else replace(rollout, groups=groups)
