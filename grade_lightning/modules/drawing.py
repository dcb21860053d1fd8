"""Drawing completions and scoring them, one part after another: while one is scored, the next is drawn."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grade_lightning.records import Experience, Prompts, Rollout, Scores


def draw_and_score(
    draw: Callable[[Prompts, Tensor], Rollout],
    begin: Callable[[Rollout], Callable[[], Scores]],
    prompts: Prompts,
    counts: Tensor,
    at_once: int | None,
    scored: int,
) -> Experience:
    """Completions of prompts with their scores. The completions of a prompt are drawn and scored together.

    Args:
        draw: completions of prompts, with a label of the group for each.
        begin: begins to score a rollout; what it returns waits for the scores. One part is waited for before the next
            is begun, so that a reward's own limits hold.
        prompts: P prompts.
        counts: (P,): completions of each.
        at_once: how many completions are drawn at once; None: all. A prompt with more is drawn by itself.
        scored: of how many prompts the completions are scored at once.
    """
    rollouts: list[Rollout] = []
    scores: list[Scores] = []
    under_way: Callable[[], Scores] | None = None
    for first, own in _drawn_together(counts, at_once):
        groups = torch.arange(len(own)).repeat_interleave(own)
        rollout = draw(prompts.slice(first, len(own)).repeat(own), groups)
        rollouts.append(rollout)
        for together in torch.arange(len(own)).split(scored):
            if under_way is not None:
                scores.append(under_way())
            under_way = begin(rollout.select(torch.isin(groups, together).nonzero().squeeze(1)))
    if under_way is not None:
        scores.append(under_way())
    return Experience(rollouts[0] if len(rollouts) == 1 else Rollout.join(rollouts), Scores.join(scores))


def _drawn_together(counts: Tensor, at_once: int | None) -> Iterator[tuple[int, Tensor]]:
    """The first prompt of each part, and the counts of its prompts.

    Example:
        >>> [(first, own.tolist()) for first, own in _drawn_together(torch.tensor([2, 2, 1, 5, 1]), 4)]
        [(0, [2, 2]), (2, [1]), (3, [5]), (4, [1])]
    """
    if at_once is None:
        yield 0, counts
        return
    first = total = 0
    for at, count in enumerate(counts.tolist()):
        if total and total + count > at_once:
            yield first, counts[first:at]
            first, total = at, 0
        total += count
    yield first, counts[first:]
