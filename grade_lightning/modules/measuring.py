"""Measuring: one teacher-forced pass of the policy and of its reference, and what it says of each token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from grade_lightning.columns import Columns
from grade_lightning.credit import COLUMN, TokenScores
from grade_lightning.functional import divergences, sequences
from grade_lightning.functional.control_variates import deviation
from grade_lightning.functional.vocabulary import Vocabulary
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout, TokenStats
from grade_lightning.rollouts import Distribution
from grade_lightning.terms import GRAPHS, Graphs

COUNT = 5
"""Statistics that are measured for every method: those of :func:`figures`."""
OWN = 3
"""The first ones of these, which need no reference."""


def measure(
    policy: Policy,
    distribution: Distribution,
    rollout: Rollout,
    known: TokenStats | None = None,
    graphs: Graphs = "log_ratio",
    values: Callable[[Tensor], Tensor] | None = None,
    parts: Sequence[Columns] = (),
    scores: TokenScores | None = None,
    referenced: bool = True,
) -> TokenStats:
    """Statistics of a rollout's tokens, the policy's own or others.

    Args:
        policy: the policy and its reference.
        distribution: of the tokens.
        rollout: the completions.
        known: earlier statistics, of which all are taken over but `values` and those with graphs. The reference is
            needed only where KL is among these.
        graphs: up to which of the statistics there are graphs.
        values: a value head on the hidden states.
        parts: those that ask for further statistics.
        scores: of the tokens: how much higher the sampled one scores than was to be expected is measured, with a graph.
        referenced: without the reference what needs it is NaN, and a pass is saved.
    """
    hidden = policy.training_pass.hidden(policy, rollout)
    vocabulary = policy.vocabulary(rollout.take(hidden))
    wanted, first = 1 + GRAPHS.index(graphs), int(scores is not None)

    def all_figures(logits: Tensor, rows: slice, *more: Any) -> Iterator[Tensor]:
        if scores is not None:
            yield deviation(distribution.both(rollout, logits, rows)[0], rollout.tokens[rows], scores(rows))
        yield from _figures(distribution, rollout, logits, rows, *more)

    if known is not None and graphs != "kl":
        now = vocabulary.map(lambda logits, rows: islice(all_figures(logits, rows), first + wanted))
        found = _updated(known, rollout, now[first:])
        if scores is not None:
            found = replace(found, columns=found.columns | {COLUMN: rollout.put(now[0])})
    else:
        reference = reference_vocabulary(policy, rollout) if referenced else None
        count = COUNT if referenced else OWN
        hidden_states = vocabulary.hidden.detach()
        columns = vocabulary.map(
            lambda logits, rows: all_figures(logits, rows, reference, hidden_states, parts),
            differentiable=first + wanted,
        )
        names = [COLUMN] * first + [name for part in parts for name in part.names]
        more = dict(zip(names, map(rollout.put, columns[:first] + columns[first + count :]), strict=True))
        found = replace(stats_of(rollout, columns[first : first + count]), columns=more)
    return found if values is None else replace(found, values=values(hidden))


@torch.no_grad()
def reference_vocabulary(policy: Policy, rollout: Rollout) -> Vocabulary:
    """The reference's logits at the sampled positions."""
    hidden = policy.training_pass.hidden(policy.frozen, rollout)
    return policy.frozen.vocabulary(rollout.take(hidden))


@torch.no_grad()
def sampled_logps(vocabulary: Vocabulary, distribution: Distribution, rollout: Rollout) -> Tensor:
    """Log-probabilities of the sampled tokens alone, (B, T); 0 elsewhere."""

    def columns(logits: Tensor, rows: slice) -> list[Tensor]:
        sampled, _ = distribution.both(rollout, logits, rows)
        return [sequences.token_logps(sampled, rollout.tokens[rows])]

    return rollout.put(*vocabulary.map(columns))


def figures(sampled: Tensor, dist: Tensor, reference: Callable[[], Tensor], tokens: Tensor) -> Iterator[Tensor]:
    """What is measured at each of n positions, one after another, each (n,).

    Args:
        sampled: log-probabilities of the distribution that was sampled, (n, V).
        dist: the same without truncation.
        reference: makes those of the reference; called when it is their turn.
        tokens: the sampled tokens, (n,).

    Yields:
        log π of the tokens as sampled; log π without truncation; entropy; exact KL; log π_ref.
    """
    yield sequences.token_logps(sampled, tokens)
    yield sequences.token_logps(dist, tokens)
    yield sequences.entropy(dist)
    ref_dist = reference()
    yield divergences.categorical_kl(dist, ref_dist)
    yield sequences.token_logps(ref_dist, tokens)


def stats_of(rollout: Rollout, columns: tuple[Tensor, ...]) -> TokenStats:
    """Put what :func:`figures` found, all of it or its own part, at the positions of its tokens."""
    logps, whole, entropy, *others = (rollout.put(column) for column in columns)
    kl, ref_logps = others or (rollout.put(torch.full_like(columns[0], torch.nan, requires_grad=False)),) * 2
    stats = TokenStats(logps=logps, log_ratio=whole - ref_logps, kl=kl, entropy=entropy, ref_logps=ref_logps)
    return replace(stats, referenced=bool(others))


def _updated(known: TokenStats, rollout: Rollout, columns: tuple[Tensor, ...]) -> TokenStats:
    """With the first of what :func:`figures` finds in a later pass; the rest is as it was."""
    logps, *others = map(rollout.put, columns)
    changes: dict[str, Any] = {"logps": logps}
    if others:
        changes["log_ratio"] = others[0] - known.ref_logps
    if len(others) > 1:
        changes["entropy"] = others[1]
    return replace(known, **changes)


def _figures(
    distribution: Distribution,
    rollout: Rollout,
    logits: Tensor,
    rows: slice,
    reference: Vocabulary | None = None,
    hidden: Tensor | None = None,
    parts: Sequence[Columns] = (),
) -> Iterator[Tensor]:
    """What is measured for every method, then what the parts ask for."""
    sampled, dist = distribution.both(rollout, logits, rows)

    def ref_dist() -> Tensor:
        assert reference is not None
        return distribution.log_distribution(reference.at(rows))

    own = OWN if reference is None else COUNT
    yield from islice(figures(sampled, dist, ref_dist, rollout.tokens[rows]), own)
    for part in parts:
        assert hidden is not None
        yield from part.columns(sampled, rollout.tokens[rows], hidden[rows])
