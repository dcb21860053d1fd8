"""The first batch: is what was sampled the policy's own, and is the policy the reference that it started as?"""

import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import masked_sum, token_logps
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout
from grade_lightning.rollouts import Distribution, Sampler

from .measuring import measure

ROWS = 16
"""Sequences that are measured: no more memory than a step takes."""


@torch.no_grad()
def check_first_batch(policy: Policy, sampler: Sampler, rollout: Rollout, started: bool, reduced: bool) -> None:
    """Measure the completions without dropout, and compare with the engine and with the reference.

    Where log-probabilities differ, the model alone is asked, a sequence without padding, so that the message can name
    the part that is wrong.

    Args:
        policy: the policy.
        sampler: what drew the completions.
        rollout: the completions, drawn with the weights that the policy has now; a few of them are enough.
        started: whether the run begins here: then the policy is its reference.
        reduced: whether something is computed in 16 bits.

    Raises:
        InputError: something differs, or is not a number.
    """
    rollout = rollout.select(torch.arange(min(len(rollout.ids), ROWS)))
    with policy.evaluating():
        found = measure(policy, sampler.distribution, rollout)
        tolerance = 0.1 if reduced else 1e-3
        kl = float(masked_sum(found.kl, rollout.sampled).abs().max())
        if started and not kl <= tolerance:
            raise InputError(
                f"KL to the reference at step 0 is {kl:.3g} nats instead of 0: the reference is not the model that the "
                "policy started as (was an adapter merged or loaded into one of them?)"
            )
        if rollout.engine_logps is None:
            return
        gaps = (found.logps - rollout.engine_logps).abs()
        gap = float(gaps[rollout.sampled].mean())
        if gap <= tolerance:
            return
        worst = int(masked_sum(gaps, rollout.sampled).nan_to_num(nan=torch.inf).argmax())
        ours, engine = (x[worst][rollout.sampled[worst]] for x in (found.logps, rollout.engine_logps))
        own, raw = _alone(policy, sampler.distribution, rollout.select(torch.tensor([worst])))
    names = type(sampler.engine).__name__, type(policy.base).__name__
    raise InputError(
        f"log-probabilities of the training pass differ from those of the engine ({names[0]}) by {gap:.3g} nats a "
        f"token on average; {_culprit(ours, engine, own, raw, tolerance, *names)}"
    )


def _alone(policy: Policy, distribution: Distribution, row: Rollout) -> tuple[Tensor, Tensor]:
    """What the model's own forward pass says of one sequence: of the sampled distribution, and of its bare softmax."""
    width = row.prompt_ids.shape[1]
    logits = row.take(policy.base(input_ids=row.ids, use_cache=False).logits[:, width - 1 : -1])
    sampled = distribution.sampled_logits(row, logits, slice(None)).log_softmax(-1)
    return token_logps(sampled, row.tokens), token_logps(logits.float().log_softmax(-1), row.tokens)


def _culprit(
    ours: Tensor, engine: Tensor, own: Tensor, raw: Tensor, tolerance: float, engine_name: str, model_name: str
) -> str:
    """Which part is wrong, by what the model alone says of the same tokens."""

    def same(one: Tensor, two: Tensor) -> bool:
        return bool((one - two).abs().mean() <= tolerance)

    if not same(ours, own):
        return (
            f"the training pass of {model_name} is wrong, for the model by itself says something else of a sequence "
            "without padding; try --model.policy.attn_implementation eager, or another model"
        )
    if same(engine, raw):
        return (
            f"{engine_name} reports log-probabilities before temperature, top-k and top-p; it must report those of the "
            "distribution that it sampled"
        )
    return (
        "the model by itself agrees with the training pass, so the completions were not sampled from the policy that "
        f"is trained: {engine_name} has other weights, other settings than --model.sampler, or computes in another "
        "precision; for the last set --model.correction EngineCorrection"
    )
