"""Measuring: one teacher-forced pass of the policy and of its reference, and what it says of each token."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from grade_lightning.functional import divergences, sequences
from grade_lightning.functional.vocabulary import Vocabulary
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout, TokenStats
from grade_lightning.rollouts import Distribution
from grade_lightning.terms import Graphs


def measure(
    policy: Policy,
    distribution: Distribution,
    rollout: Rollout,
    known: TokenStats | None = None,
    graphs: Graphs = "log_ratio",
    values: Callable[[Tensor], Tensor] | None = None,
) -> TokenStats:
    """Statistics of a rollout's tokens, the policy's own or others.

    Args:
        policy: the policy and its reference.
        distribution: of the tokens.
        rollout: the completions.
        known: earlier statistics, of which all but `logps` (and `values`) are taken over; the reference is not needed.
        graphs: up to which of the statistics there are graphs.
        values: a value head on the hidden states.
    """
    hidden = policy.training_pass.hidden(policy, rollout)
    vocabulary = policy.vocabulary(rollout.take(hidden))
    if known is not None:
        (logps,) = vocabulary.map(lambda logits, rows: islice(_figures(distribution, rollout, logits, rows), 1))
        found = replace(known, logps=rollout.put(logps))
    else:
        reference = reference_vocabulary(policy, rollout)
        columns = vocabulary.map(
            lambda logits, rows: _figures(distribution, rollout, logits, rows, reference),
            differentiable=3 if graphs == "kl" else 2,
        )
        found = stats_of(rollout, columns)
    return found if values is None else replace(found, values=values(hidden))


@torch.no_grad()
def reference_vocabulary(policy: Policy, rollout: Rollout) -> Vocabulary:
    """The reference's logits at the sampled positions."""
    hidden = policy.training_pass.hidden(policy.frozen, rollout)
    return policy.frozen.vocabulary(rollout.take(hidden))


def figures(sampled: Tensor, dist: Tensor, reference: Callable[[], Tensor], tokens: Tensor) -> Iterator[Tensor]:
    """What is measured at each of n positions, one after another, each (n,).

    Args:
        sampled: log-probabilities of the distribution that was sampled, (n, V).
        dist: the same without truncation.
        reference: makes those of the reference; called when it is their turn.
        tokens: the sampled tokens, (n,).

    Yields:
        log π of the tokens as sampled; log π without truncation; exact KL; entropy; log π_ref.
    """
    yield sequences.token_logps(sampled, tokens)
    yield sequences.token_logps(dist, tokens)
    ref_dist = reference()
    yield divergences.categorical_kl(dist, ref_dist)
    yield sequences.entropy(dist)
    yield sequences.token_logps(ref_dist, tokens)


def stats_of(rollout: Rollout, columns: tuple[Tensor, ...]) -> TokenStats:
    """Put what :func:`figures` found at the positions of its tokens."""
    logps, whole, kl, entropy, ref_logps = (rollout.put(column) for column in columns)
    return TokenStats(logps=logps, log_ratio=whole - ref_logps, kl=kl, entropy=entropy, ref_logps=ref_logps)


def _figures(
    distribution: Distribution, rollout: Rollout, logits: Tensor, rows: slice, reference: Vocabulary | None = None
) -> Iterator[Tensor]:
    sampled, dist = distribution.both(rollout, logits, rows)

    def ref_dist() -> Tensor:
        assert reference is not None
        return distribution.log_distribution(reference.at(rows))

    return figures(sampled, dist, ref_dist, rollout.tokens[rows])
