"""The optimal token baseline: a baseline of each position, weighed by how much noise each completion makes there."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grade_lightning.functional.groups import Groups


def optimal_token_baseline(
    rewards: Float[Tensor, " b"],
    norms: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    groups: Groups,
    leave_one_out: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "b t"]:
    """B_t = Σ R W_t / Σ W_t over the completions of a prompt, with W_t = Σ_{u ≤ t} |e_{x_u} − π_u|².

    A completion that has ended keeps its last W; one without a reward counts nothing. Where all weights are 0 it is the
    mean reward. NaN where nothing counts.

    Args:
        rewards: of each completion; NaN without one.
        norms: |e_x − π|² of each token: :func:`.scores.score_norm`.
        mask: tokens that were sampled.
        groups: which completions are of one prompt.
        leave_one_out: only the others count, so that the gradient is unbiased.
        eps: added to each weight.

    References:
        | The Optimal Token Baseline (2026), https://arxiv.org/abs/2602.07078

    Example:
        >>> from grade_lightning.functional.groups import group_by
        >>> rewards, norms = torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 1.0], [1.0, 5.0]])
        >>> groups, mask = group_by(torch.tensor([7, 7])), torch.ones(2, 2, dtype=torch.bool)
        >>> optimal_token_baseline(rewards, norms, mask, groups, leave_one_out=False)
        tensor([[0.5000, 0.7500],
                [0.5000, 0.7500]])
    """
    answered = ~rewards.isnan()
    weights = (norms.masked_fill(~mask, 0).cumsum(-1) + eps) * answered.unsqueeze(1)
    index = groups.row.to(rewards.device), groups.column.to(rewards.device)
    table = weights.new_zeros(*groups.shape, weights.shape[1])
    weighed = table.index_put(index, weights * rewards.nan_to_num(nan=0.0).unsqueeze(1))
    table = table.index_put(index, weights)
    size = groups.shape[1]
    others = torch.ones(size, size, dtype=table.dtype, device=table.device)
    if leave_one_out:
        others = others - torch.eye(size, dtype=table.dtype, device=table.device)
    sums, whole = (torch.einsum("ij,pjt->pit", others, x)[index] for x in (weighed, table))
    return sums / whole
