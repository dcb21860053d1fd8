"""The optimal token baseline against a loop, and by enumeration."""

import itertools

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.groups import Groups, group_by
from grade_lightning.functional.scores import score_norm
from grade_lightning.functional.token_baseline import optimal_token_baseline
from tests.functional.problems import Problem, ends, equal


@pytest.mark.parametrize("alone", [True, False])
def test_against_a_loop(alone: bool) -> None:
    """Groups of one, two and four, of different lengths; one completion has no reward."""
    generator = torch.Generator().manual_seed(0)
    norms = 2 * torch.rand(7, 5, dtype=torch.float64, generator=generator)
    rewards = torch.randn(7, dtype=torch.float64, generator=generator)
    rewards[4] = torch.nan
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1], [4], [5], [2]])
    labels = [0, 1, 1, 2, 2, 2, 2]
    found = optimal_token_baseline(rewards, norms.masked_fill(~mask, 9.0), mask, group_by(torch.tensor(labels)), alone)
    for i, t in itertools.product(range(7), range(5)):
        weights = {
            j: sum(float(norms[j, u]) for u in range(t + 1) if mask[j, u])
            for j in range(7)
            if labels[j] == labels[i] and not rewards[j].isnan() and not (alone and i == j)
        }
        if weights:
            truth = sum(w * float(rewards[j]) for j, w in weights.items()) / sum(weights.values())
            assert float(found[i, t]) == pytest.approx(truth, rel=1e-6)
        else:
            assert found[i, t].isnan()


def grouped(problem: Problem, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """All groups of completions: (N^size, size) numbers; the probability of each; |e_x − π|² of each token."""
    groups = torch.tensor(list(itertools.product(range(len(problem.tokens)), repeat=size)))
    table = problem.logits.log_softmax(-1)
    return groups, problem.probs(problem.logits)[groups].prod(-1), score_norm(table[problem.rows], problem.tokens)


def gradients(problem: Problem, advantages: Tensor) -> Tensor:
    """Σ_t A_t ∇log π of each completion, (n, prefixes, V)."""
    table = problem.logits.log_softmax(-1)
    score = torch.nn.functional.one_hot(problem.tokens, 3) - table.exp()[problem.rows]
    terms = (advantages.unsqueeze(-1) * score).masked_fill(~problem.mask.unsqueeze(-1), 0)
    found = torch.zeros(len(advantages), *problem.logits.shape, dtype=torch.float64)
    return found.scatter_add(1, problem.rows.unsqueeze(-1).expand_as(terms), terms)


@ends
def test_without_the_own_reward_it_is_unbiased(ends: bool) -> None:
    """Over all groups of three completions; with the own reward in the baseline the gradient is too short."""
    problem, size = Problem(ends), 3
    groups, probs, norms = grouped(problem, size)
    row, column = (torch.arange(len(groups)).repeat_interleave(size), torch.arange(size).repeat(len(groups)))
    labels, rows = Groups(row, column, (len(groups), size)), groups.flatten()
    for alone in (True, False):
        baseline = optimal_token_baseline(problem.rewards[rows], norms[rows], problem.mask[rows], labels, alone)
        own = (problem.rewards[rows].unsqueeze(1) - baseline)[::size]  # of the first of each group
        mean = torch.zeros_like(problem.logits)
        for i in range(len(problem.tokens)):
            chosen = groups[:, 0] == i
            mean += gradients(problem, (probs[chosen].unsqueeze(1) * own[chosen]).sum(0).expand(len(norms), -1))[i]
        if alone:
            equal(mean, problem.truth(), 1e-7)
        else:
            assert (mean - problem.truth()).norm() > 0.1


@ends
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_known_exactly_it_has_less_variance_than_the_mean_reward(ends: bool, seed: int) -> None:
    """Each completion counts by its probability."""
    problem = Problem(ends, seed=seed)
    probs = problem.probs(problem.logits)
    _, _, norms = grouped(problem, 1)
    weights = probs.unsqueeze(1) * norms.masked_fill(~problem.mask, 0).cumsum(-1)
    baselines = (weights * problem.rewards.unsqueeze(1)).sum(0) / weights.sum(0), (probs * problem.rewards).sum()
    variances = []
    for baseline in baselines:
        each = gradients(problem, (problem.rewards.unsqueeze(1) - baseline).expand_as(norms))
        mean = torch.einsum("n,npv->pv", probs, each)
        equal(mean, problem.truth())
        variances.append(float(torch.einsum("n,npv->", probs, each.square()) - mean.square().sum()))
    assert variances[0] < 0.999 * variances[1]
